"""The linear layer of the mixer's projections."""

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from semivim.ops.linear import linear


@register_notrace_module
class Linear(nn.Linear):
    """`torch.nn.Linear` without bias, by the product of `semivim.ops.linear`.

    Args:
        in_features: Channels of the input.
        out_features: Channels of the output.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return linear(x, self.weight)
        return F.linear(x, self.weight)
