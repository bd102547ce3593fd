"""Causal and anti-causal depthwise convolution with SiLU, channel-last, without flipped or transposed copies.

Dimensions: b images, l tokens, d channels, k taps. A backend is a module `conv_<name>` (listed in `backends.py`) with
`unavailable(device)`, `bidirectional_conv_forward` and `bidirectional_conv_backward`, signatures as in
`conv_reference`; outputs and gradients are contiguous, freshly allocated, in the dtype of what they belong to.
"""

import torch
from torch import Tensor

from .backends import choose, of_forward


def _check(x: Tensor, weight: Tensor, bias: Tensor, weight_b: Tensor, bias_b: Tensor) -> None:
    """Name the argument whose shape does not fit."""
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x must be (b, l, d) of a floating dtype, got {tuple(x.shape)} of {x.dtype}")
    for name, w in (("weight", weight), ("bias", bias), ("weight_b", weight_b), ("bias_b", bias_b)):
        if w.device != x.device or not w.is_floating_point():
            raise ValueError(f"{name} must be of a floating dtype on {x.device} as x is, got {w.dtype} on {w.device}")
    d = x.shape[2]
    if weight.dim() != 3 or weight.shape[0] != d or weight.shape[1] != 1 or weight.shape[2] == 0:
        raise ValueError(f"weight must be (d, 1, k) = ({d}, 1, k), got {tuple(weight.shape)}")
    if weight_b.shape != weight.shape:
        raise ValueError(f"weight_b must be (d, 1, k) = {tuple(weight.shape)}, got {tuple(weight_b.shape)}")
    for name, offset in (("bias", bias), ("bias_b", bias_b)):
        if tuple(offset.shape) != (d,):
            raise ValueError(f"{name} must be (d,) = ({d},), got {tuple(offset.shape)}")


def _new(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("semivim::bidirectional_conv", mutates_args=())
def _bidirectional_conv(
    x: Tensor, weight: Tensor, bias: Tensor, weight_b: Tensor, bias_b: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    _check(x, weight, bias, weight_b, bias_b)
    module = choose("conv", backend, x.device, x.dtype)
    if x.numel() == 0:
        return _new(x), _new(x)
    return module.bidirectional_conv_forward(x, weight, bias, weight_b, bias_b)


@_bidirectional_conv.register_fake
def _bidirectional_conv_fake(x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    _check(x, *weights[:4])
    return _new(x), _new(x)


@torch.library.custom_op("semivim::bidirectional_conv_backward", mutates_args=())
def _bidirectional_conv_backward(
    grad: Tensor,
    grad_b: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_b: Tensor,
    bias_b: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    module = choose("conv", backend, x.device, x.dtype)
    if x.numel() == 0:
        return _new(x), *(torch.zeros_like(w) for w in (weight, bias, weight_b, bias_b))  # type: ignore[return-value]
    return module.bidirectional_conv_backward(grad, grad_b, x, weight, bias, weight_b, bias_b)


@_bidirectional_conv_backward.register_fake
def _bidirectional_conv_backward_fake(
    grad: Tensor,  # noqa: ARG001
    grad_b: Tensor,  # noqa: ARG001
    *operands: Tensor,
) -> tuple[Tensor, ...]:
    return tuple(_new(operand) for operand in operands[:5])


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ARG001
    *tensors, backend = inputs
    ctx.backend = of_forward("conv", backend, tensors[0].device, tensors[0].dtype)
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad, grad_b):  # type: ignore[no-untyped-def]
    return (*torch.ops.semivim.bidirectional_conv_backward(grad, grad_b, *ctx.saved_tensors, ctx.backend), None)


_bidirectional_conv.register_autograd(_differentiate, setup_context=_save)


def bidirectional_conv(
    x: Tensor, weight: Tensor, bias: Tensor, weight_b: Tensor, bias_b: Tensor, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """u_t = SiLU(bias + sum_j w_j x_{t-(k-1)+j});  u_b,t = SiLU(bias_b + sum_j w_b,j x_{t+(k-1)-j}).

    Zeros stand before the first and after the last token. The second convolution equals the first kind run on the
    flipped sequence and flipped back, without the flips.

    Args:
        x: Input, ``(b, l, d)``, any float dtype; rows may be strided, e.g. half of a projection's output.
        weight: Taps of the causal convolution, ``(d, 1, k)``, as in ``nn.Conv1d``.
        bias: ``(d,)``.
        weight_b: Taps of the anti-causal convolution, ``(d, 1, k)``.
        bias_b: ``(d,)``.
        backend: One of `available_backends`, or None to choose.

    Returns:
        u and u_b, contiguous ``(b, l, d)``, in the dtype of ``x``.

    Raises:
        ValueError: If a shape, device or dtype does not fit, or the named backend cannot run.

    Source: Zhu et al. 2024 (Vision Mamba, arXiv:2401.09417), Algorithm 1.
    """
    out = torch.ops.semivim.bidirectional_conv(
        x, weight, bias, weight_b, bias_b, "auto" if backend is None else backend
    )
    return out[0], out[1]
