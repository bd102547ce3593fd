"""Causal and anti-causal depthwise convolution with SiLU by causal-conv1d's CUDA kernels, where it is installed.

Dimensions: b images, l tokens, d channels, k taps, 2 to 4 of them. causal-conv1d reads channel-last rows as they lie;
the second direction runs on flipped ones. Its autograd function is called by its two halves, as in `scan_cuda`, with
names and arguments that every release has.
"""

from causal_conv1d.causal_conv1d_interface import CausalConv1dFn
from torch import Tensor

from .scan_cuda import Context, unavailable

__all__ = ["bidirectional_conv_backward", "bidirectional_conv_forward", "unavailable"]


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


def bidirectional_conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor, weight_b: Tensor, bias_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Return u and u_b, contiguous ``(b, l, d)``."""
    u, _ = _forward(x, weight, bias)
    u_b, _ = _forward(x.flip(1), weight_b, bias_b)
    return u.contiguous(), u_b.flip(1).contiguous()


def bidirectional_conv_backward(
    grad: Tensor, grad_b: Tensor, x: Tensor, weight: Tensor, bias: Tensor, weight_b: Tensor, bias_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, bias, weight_b, bias_b for those of u and u_b."""
    _, context = _forward(x, weight, bias)
    dx, dweight, dbias, *_ = CausalConv1dFn.backward(context, _rows(grad))
    _, context = _forward(x.flip(1), weight_b, bias_b)
    dx_b, dweight_b, dbias_b, *_ = CausalConv1dFn.backward(context, _rows(grad_b.flip(1)))
    total = dx.transpose(1, 2).float() + dx_b.transpose(1, 2).flip(1).float()
    return (
        total.to(x.dtype).contiguous(),
        dweight[:, None],
        dbias.to(bias.dtype),
        dweight_b[:, None],
        dbias_b.to(bias_b.dtype),
    )
