"""Training utilities, as timm/utils would hold them."""

from semivim.utils.lyap_ema import LyapEmaV3
from semivim.utils.lyapunov import LyapStats

__all__ = ["LyapEmaV3", "LyapStats"]
