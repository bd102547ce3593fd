"""Causal and anti-causal depthwise convolution with SiLU by causal-conv1d's CUDA kernels, where it is installed.

Dimensions: b images, l tokens, d channels, k taps, 2 to 4 of them. causal-conv1d reads channel-last rows as they lie;
a direction from the last token to the first runs on flipped ones. Its autograd function is called by its two halves,
as in `scan_cuda`, with names and arguments that every release has.
"""

import torch
from causal_conv1d.causal_conv1d_interface import CausalConv1dFn
from torch import Tensor

from .cuda_call import Context
from .cuda_call import unavailable as unavailable
from .eager import deliver


def _rows(x: Tensor) -> Tensor:
    """``(b, d, l)``, channel-last where the kernel's 8-element alignment allows it."""
    rows = x.contiguous().transpose(1, 2)
    return rows if x.shape[2] % 8 == 0 else rows.contiguous()


def _forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Context]:
    taps = weight.shape[2]
    if not 2 <= taps <= 4:
        raise ValueError(f"weight must have 2 to 4 taps for causal-conv1d, got {taps}")
    context = Context()
    u = CausalConv1dFn.forward(
        context, _rows(x), weight[:, 0].contiguous(), bias.to(weight.dtype).contiguous(), activation="silu"
    )
    return u.transpose(1, 2), context


def _oriented(x: Tensor, reverse: bool) -> Tensor:
    return x.flip(1) if reverse else x


def forward(x: Tensor, weights: list[tuple[Tensor, Tensor]], reverse: list[bool]) -> list[Tensor]:
    """Return the output of each direction, contiguous ``(b, l, d)``."""
    return [
        _oriented(_forward(_oriented(x, back), weight, bias)[0], back).contiguous()
        for (weight, bias), back in zip(weights, reverse, strict=True)
    ]


def backward(
    grads: list[Tensor],
    x: Tensor,
    weights: list[tuple[Tensor, Tensor]],
    reverse: list[bool],
    dx: Tensor | None = None,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return the gradients of x and of each direction's weight and bias."""
    of_directions, gradients = [], []
    for grad, (weight, bias), back in zip(grads, weights, reverse, strict=True):
        _, context = _forward(_oriented(x, back), weight, bias)
        dx_k, dweight, dbias, *_ = CausalConv1dFn.backward(context, _rows(_oriented(grad, back)))
        of_directions.append(_oriented(dx_k.transpose(1, 2), back).float())
        gradients.append((dweight[:, None], dbias.to(bias.dtype)))
    of_x = sum(of_directions[1:], of_directions[0]).to(x.dtype, copy=True, memory_format=torch.contiguous_format)
    return deliver(of_x, x.dtype, dx), gradients
