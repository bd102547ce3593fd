"""Causal and anti-causal depthwise convolution with SiLU in plain torch: what faster backends are tested against.

Dimensions: b images, l tokens, d channels, k taps. Sums are float32 (float64 for float64 inputs).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .scan_reference import state_dtype, unavailable

__all__ = ["bidirectional_conv_backward", "bidirectional_conv_forward", "unavailable"]


def bidirectional_conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor, weight_b: Tensor, bias_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Return u and u_b, contiguous ``(b, l, d)``."""
    return tuple(F.silu(c).to(x.dtype).contiguous() for c in _convolve_both(x, weight, bias, weight_b, bias_b))  # type: ignore[return-value]


def _convolve_both(x: Tensor, weight: Tensor, bias: Tensor, weight_b: Tensor, bias_b: Tensor) -> tuple[Tensor, Tensor]:
    """Both convolutions before SiLU, in the wide dtype."""
    wide = state_dtype(x)
    last = weight.shape[2] - 1
    padded = F.pad(x.to(wide), [0, 0, last, last])
    ahead, back = (
        sum(w[:, 0, j].to(wide) * padded[:, start : start + x.shape[1]] for j, start in enumerate(starts))
        for w, starts in ((weight, range(last + 1)), (weight_b, range(2 * last, last - 1, -1)))
    )
    return ahead + bias.to(wide), back + bias_b.to(wide)


def bidirectional_conv_backward(
    grad: Tensor, grad_b: Tensor, x: Tensor, weight: Tensor, bias: Tensor, weight_b: Tensor, bias_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, bias, weight_b, bias_b for those of u and u_b."""
    wide = state_dtype(x)
    l, last = x.shape[1], weight.shape[2] - 1
    padded = F.pad(x.to(wide), [0, 0, last, last])
    dx = torch.zeros_like(padded)
    gradients = []
    convolved = _convolve_both(x, weight, bias, weight_b, bias_b)
    starts = range(last + 1), range(2 * last, last - 1, -1)
    for g, c, w, offset, at in zip((grad, grad_b), convolved, (weight, weight_b), (bias, bias_b), starts, strict=True):
        sigmoid = torch.sigmoid(c)
        dc = g.to(wide) * sigmoid * (1 + c * (1 - sigmoid))
        dw = torch.empty(w.shape, dtype=wide, device=w.device)
        for j, start in enumerate(at):
            dw[:, 0, j] = (dc * padded[:, start : start + l]).sum((0, 1))
            dx[:, start : start + l] += dc * w[:, 0, j].to(wide)
        gradients += [dw.to(w.dtype), dc.sum((0, 1)).to(offset.dtype)]
    return (dx[:, last : last + l].to(x.dtype).contiguous(), *gradients)  # type: ignore[return-value]
