"""Training utilities."""

from semivim.utils.lyap_ema import LyapEmaV3, LyapStats

__all__ = ["LyapEmaV3", "LyapStats"]
