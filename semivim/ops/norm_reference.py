"""RMS norm in plain torch: what the faster backend is tested against.

Sums are float32 (float64 for float64 inputs).
"""

import torch
from torch import Tensor


def unavailable(device: torch.device) -> str | None:  # noqa: ARG001
    """Return why this backend cannot run on a device; the reference always can."""
    return None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the result of `semivim.ops.rms_norm.rms_norm`, and ``1 / sqrt(mean(x^2) + eps)`` of each row."""
    wide = _wide(x)
    scales = torch.rsqrt(wide.square().mean(-1) + eps)
    return (wide * scales[..., None] * _wide(weight)).to(x.dtype), scales.flatten()


def backward(grad: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the weight."""
    wide, of_normalised = _wide(x), _wide(grad) * _wide(weight)
    scales = scales.view(*x.shape[:-1], 1)
    normalised = wide * scales
    along = (of_normalised * normalised).mean(-1, keepdim=True)
    dx = (of_normalised - normalised * along) * scales
    dweight = (_wide(grad) * normalised).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype), dweight.to(weight.dtype)
