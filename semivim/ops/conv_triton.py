"""Causal depthwise convolution with SiLU on GPUs, in either direction or both, in Triton, forward and backward.

Dimensions: b images, l tokens, d channels, k taps. Both directions come from one read of x. The gradients of weights
and biases are written per program and summed in a fixed order: the same bits every time.

Source: Zhu et al. 2024 (Vision Mamba, arXiv:2401.09417), Algorithm 1.
"""

import torch
from torch import Tensor

from . import conv_kernels_triton as kernels
from .launch_triton import alignment, ceil_div, check_size, launch, unavailable

__all__ = ["backward", "forward", "unavailable"]

# Measured on one H200.
SEGMENT = 32  # tokens of a program
AHEAD = 8  # rows loaded at a time
FORWARD_CHANNELS, BACKWARD_CHANNELS = 128, 64  # of a program
SUM_COLUMNS, SUM_SHARES = 64, 32
ONE_WARP = {"num_warps": 1}

Weights = list[tuple[Tensor, Tensor]]


def _read(x: Tensor, weights: Weights, reverse: list[bool]) -> tuple[Tensor, list[Tensor], list[int]]:
    """Return x with dense channels, the weights as the kernels take them, and which direction is (ahead, back)."""
    if len(reverse) > 2 or (len(reverse) == 2 and reverse[0] == reverse[1]):
        raise ValueError(f"the Triton convolution takes one direction or two opposite ones, got reverse={reverse}")
    if x.stride(2) != 1:
        x = x.contiguous()
    b, l, d = x.shape
    check_size(b, l * max(d, x.stride(1)))
    ahead, back = reverse.index(min(reverse)), reverse.index(max(reverse))
    (weight, bias), (weight_b, bias_b) = weights[ahead], weights[back]
    return x, [w.contiguous() for w in (weight, weight_b, bias, bias_b)], [ahead, back]


def _constants(weights: Weights, reverse: list[bool]) -> dict[str, int]:
    return {
        "d": weights[0][0].shape[0],
        "TAPS": weights[0][0].shape[2],
        "AHEAD": not all(reverse),
        "BACK": any(reverse),
    }


def forward(x: Tensor, weights: Weights, reverse: list[bool]) -> list[Tensor]:
    """Return the output of each direction, contiguous ``(b, l, d)``; see `semivim.ops.causal_conv.causal_conv`.

    Raises:
        ValueError: If the directions are neither one nor two opposite ones, or the batch or an image is too large.
    """
    x, read, (ahead, back) = _read(x, weights, reverse)
    b, l, d = x.shape
    out = [torch.empty((b, l, d), dtype=x.dtype, device=x.device) for _ in reverse]
    launch(
        kernels.conv_forward, (ceil_div(l, SEGMENT), ceil_div(d, FORWARD_CHANNELS), b),
        out[ahead], out[back], x, *read, *x.stride()[:2], l, SEGMENT,
        **_constants(weights, reverse), BLOCK_D=FORWARD_CHANNELS, T=AHEAD, options=ONE_WARP,
        specialized=alignment([x], x.stride()[:2]),
    )  # fmt: skip
    return out


def backward(
    grads: list[Tensor],
    x: Tensor,
    weights: Weights,
    reverse: list[bool],
    dx: Tensor | None = None,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return the gradients of x and of each direction's weight and bias, for those of the outputs."""
    x, read, (ahead, back) = _read(x, weights, reverse)
    b, l, d = x.shape
    grads = [g.contiguous() for g in grads]
    constants = _constants(weights, reverse)
    taps, segments = constants["TAPS"], ceil_div(l, SEGMENT)
    if dx is None:
        dx = torch.empty((b, l, d), dtype=x.dtype, device=x.device)
    shares = torch.empty((len(reverse), b * segments, taps + 1, d), dtype=torch.float32, device=x.device)
    launch(
        kernels.conv_backward, (segments, ceil_div(d, BACKWARD_CHANNELS), b),
        dx, shares, grads[ahead], grads[back], x, *read, *x.stride()[:2], l, SEGMENT,
        **constants, BLOCK_D=BACKWARD_CHANNELS, T=AHEAD, DX_ROW=dx.stride(1), options=ONE_WARP,
        specialized=alignment([dx, x, grads[ahead], grads[back]], x.stride()[:2]),
    )  # fmt: skip
    # One kernel writes the gradients of both directions.
    weight_dtype, bias_dtype = (torch.promote_types(read[k].dtype, read[k + 1].dtype) for k in (0, 2))
    of = [
        (
            torch.empty((d, 1, taps), dtype=weight_dtype, device=x.device),
            torch.empty((d,), dtype=bias_dtype, device=x.device),
        )
        for _ in reverse
    ]
    (dweight, dbias), (dweight_b, dbias_b) = of[ahead], of[back]
    launch(
        kernels.sum_shares, (ceil_div((taps + 1) * d, SUM_COLUMNS), len(reverse), 1),
        dweight, dweight_b, dbias, dbias_b, shares, b * segments,
        d=d, TAPS=taps, COLUMNS=SUM_COLUMNS, SHARES=SUM_SHARES, options={"num_warps": 4},
    )  # fmt: skip
    return dx, [
        (dweight.to(weight.dtype), dbias.to(bias.dtype))
        for (dweight, dbias), (weight, bias) in zip(of, weights, strict=True)
    ]
