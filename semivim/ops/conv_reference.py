"""Causal depthwise convolution with SiLU, in either direction, in plain torch: what faster backends are tested against.

Dimensions: b images, l tokens, d channels, k taps. Sums are float32 (float64 for float64 inputs).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .eager import deliver


def unavailable(device: torch.device) -> str | None:  # noqa: ARG001
    """Return why this backend cannot run on a device; the reference always can."""
    return None


def _first_rows(taps: int, reverse: bool) -> range:
    """By tap, the row of the padded input that it reads for the first token; taps - 1 rows of zeros stand around."""
    last = taps - 1
    return range(2 * last, last - 1, -1) if reverse else range(taps)


def _padded(x: Tensor, taps: int) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return F.pad(x.to(wide), [0, 0, taps - 1, taps - 1])


def _convolve(padded: Tensor, weight: Tensor, bias: Tensor, reverse: bool, tokens: int) -> Tensor:
    """The convolution before SiLU."""
    rows = _first_rows(weight.shape[2], reverse)
    terms = [weight[:, 0, j].to(padded.dtype) * padded[:, row : row + tokens] for j, row in enumerate(rows)]
    return sum(terms[1:], terms[0]) + bias.to(padded.dtype)


def forward(x: Tensor, weights: list[tuple[Tensor, Tensor]], reverse: list[bool]) -> list[Tensor]:
    """Return the output of each direction, contiguous ``(b, l, d)``; see `semivim.ops.causal_conv.causal_conv`."""
    padded = _padded(x, weights[0][0].shape[2])
    return [
        F.silu(_convolve(padded, weight, bias, back, x.shape[1])).to(x.dtype).contiguous()
        for (weight, bias), back in zip(weights, reverse, strict=True)
    ]


def backward(
    grads: list[Tensor],
    x: Tensor,
    weights: list[tuple[Tensor, Tensor]],
    reverse: list[bool],
    dx: Tensor | None = None,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return the gradients of x and of each direction's weight and bias, for those of the outputs."""
    tokens, taps = x.shape[1], weights[0][0].shape[2]
    padded = _padded(x, taps)
    dpadded = torch.zeros_like(padded)
    gradients = []
    for grad, (weight, bias), back in zip(grads, weights, reverse, strict=True):
        c = _convolve(padded, weight, bias, back, tokens)
        sigmoid = torch.sigmoid(c)
        dc = grad.to(padded.dtype) * sigmoid * (1 + c * (1 - sigmoid))
        dweight = torch.empty(weight.shape, dtype=padded.dtype, device=weight.device)
        for j, row in enumerate(_first_rows(taps, back)):
            dweight[:, 0, j] = (dc * padded[:, row : row + tokens]).sum((0, 1))
            dpadded[:, row : row + tokens] += dc * weight[:, 0, j].to(padded.dtype)
        gradients.append((dweight.to(weight.dtype), dc.sum((0, 1)).to(bias.dtype)))
    return deliver(dpadded[:, taps - 1 : taps - 1 + tokens].contiguous(), x.dtype, dx), gradients
