"""The norm of Vim's blocks."""

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from semivim.ops.rms_norm import rms_norm


@register_notrace_module
class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` over the last dimension, by the kernels of `semivim.ops.rms_norm`.

    Args:
        dim: Channels of the input.
        eps: Added to the mean square.
    """

    eps: float

    def __init__(
        self, dim: int, eps: float = 1e-5, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(dim, eps=eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
