"""Vision state-space models for timm, and semi-supervised training on them."""

from semivim import models as models  # registers vim_*, semivim_* in timm
from semivim.models.vim import Vim as Vim
from semivim.ops import available_backends as available_backends
from semivim.ops import selective_scan as selective_scan
from semivim.ops import use_backend as use_backend
from semivim.ops.scan import Direction as Direction
from semivim.ops.scan import scan as scan
from semivim.utils.lyap_ema import LyapEmaV3 as LyapEmaV3

__version__ = "0.1.0"
