"""Causal depthwise convolution with SiLU, channel-last, in one or both directions, without flipped copies.

Dimensions: b images, l tokens, d channels, k taps. A backend is a module `conv_<name>` (listed in `backends.py`) with
the functions of `conv_reference`, of the same signatures: `unavailable`, `forward` and `backward`. Outputs and
gradients are contiguous, freshly allocated, in the dtype of what they belong to. `backward` writes the gradient of x to
its last argument where it gets one: columns of contiguous rows, in the dtype of x.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import conv_reference, onnx_graph
from .backends import choose, of_forward
from .eager import differentiable_gradients, is_transformed


def _check(x: Tensor, weights: list[Tensor], reverse: list[int]) -> None:
    """Name the argument that does not fit."""
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x must be (b, l, d) of a floating dtype, got {tuple(x.shape)} of {x.dtype}")
    if len(weights) != 2 * len(reverse) or _bools(reverse) not in ([False], [True], [False, True], [True, False]):
        raise ValueError(
            f"weights must be one pair (weight, bias), or two that run in opposite directions, got {len(weights) // 2} "
            f"with reverse = {_bools(reverse)}"
        )
    d, taps = x.shape[2], weights[0].shape[-1]
    for i, w in enumerate(weights):
        name = f"weights[{i // 2}][{i % 2}]"
        if w.device != x.device or not w.is_floating_point():
            raise ValueError(f"{name} must be of a floating dtype on {x.device} as x is, got {w.dtype} on {w.device}")
        if i % 2 == 0 and (tuple(w.shape) != (d, 1, taps) or taps == 0):
            raise ValueError(f"{name} must be (d, 1, k) = ({d}, 1, {taps or 'k'}), got {tuple(w.shape)}")
        if i % 2 == 1 and tuple(w.shape) != (d,):
            raise ValueError(f"{name} must be (d,) = ({d},), got {tuple(w.shape)}")


def _pairs(weights: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(weights[::2], weights[1::2], strict=True))


def _bools(reverse: list[int]) -> list[bool]:
    return [bool(back) for back in reverse]


def _new(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("semivim::causal_conv", mutates_args=())
def _causal_conv(x: Tensor, weights: list[Tensor], reverse: list[int], backend: str) -> list[Tensor]:
    _check(x, weights, reverse)
    module = choose("conv", backend, x.device, x.dtype)
    if x.numel() == 0:
        return [_new(x) for _ in reverse]
    return module.forward(x, _pairs(weights), _bools(reverse))


@_causal_conv.register_fake
def _causal_conv_fake(x, weights, reverse, backend):  # type: ignore[no-untyped-def]  # noqa: ARG001
    _check(x, weights, reverse)
    return [_new(x) for _ in reverse]


@torch.library.custom_op("semivim::causal_conv_backward", mutates_args=())
def _causal_conv_backward(
    grads: list[Tensor], x: Tensor, weights: list[Tensor], reverse: list[int], backend: str
) -> list[Tensor]:
    """Gradients of x and the weights."""
    if x.numel() == 0:
        return [_new(x), *(torch.zeros_like(w) for w in weights)]
    dx, gradients = choose("conv", backend, x.device, x.dtype).backward(grads, x, _pairs(weights), _bools(reverse))
    return [dx, *(g for pair in gradients for g in pair)]


@_causal_conv_backward.register_fake
def _causal_conv_backward_fake(grads, x, weights, reverse, backend):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return [_new(x), *(_new(w) for w in weights)]


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ARG001
    x, weights, ctx.reverse, backend = inputs
    ctx.backend = of_forward("conv", backend, x.device, x.dtype)
    ctx.save_for_backward(x, *weights)


def _differentiate(ctx, grads):  # type: ignore[no-untyped-def]
    x, *weights = ctx.saved_tensors
    if torch.is_grad_enabled():  # by create_graph: the gradients are to be differentiated themselves

        def plain(x: Tensor, *weights: Tensor) -> list[Tensor]:
            return conv_reference.forward(x, _pairs(list(weights)), _bools(ctx.reverse))

        dx, *gradients = differentiable_gradients(plain, [x, *weights], grads)
        return dx, gradients, None, None
    dx, *gradients = torch.ops.semivim.causal_conv_backward(grads, x, weights, ctx.reverse, ctx.backend)
    return dx, gradients, None, None


_causal_conv.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.semivim.causal_conv)
def conv_flops(x_shape, weight_shapes, reverse, *_, **__) -> int:  # type: ignore[no-untyped-def]
    """Count a multiplication and an addition a tap."""
    b, l, d = x_shape
    return 2 * len(reverse) * b * l * d * weight_shapes[0][-1]


@register_flop_formula(torch.ops.semivim.causal_conv_backward)
def conv_backward_flops(grad_shapes, x_shape, weight_shapes, reverse, *_, **__) -> int:  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Count twice the forward's operations, as torch does for products."""
    return 2 * conv_flops(x_shape, weight_shapes, reverse)


def causal_conv(
    x: Tensor, weights: list[tuple[Tensor, Tensor]], reverse: list[bool], backend: str | None = None
) -> list[Tensor]:
    """u_t = SiLU(bias + sum_j w_j x_{t-(k-1)+j}), or with x_{t+(k-1)-j} where reversed.

    Zeros stand before the first and after the last token. The reversed form equals the first one run on the flipped
    sequence and flipped back, without the flips.

    Args:
        x: Input, ``(b, l, d)``, any float dtype; rows may be strided, e.g. half of a projection's output.
        weights: Per direction the taps ``(d, 1, k)``, as in ``nn.Conv1d``, and the bias ``(d,)``; one direction, or two
            opposite ones.
        reverse: Per direction whether it runs from the last token to the first.
        backend: One of `available_backends`, or None to choose.

    Returns:
        The output of each direction, contiguous ``(b, l, d)``, in the dtype of ``x``.

    Raises:
        ValueError: If a shape, device or dtype does not fit, or the named backend cannot run.

    Source: Zhu et al. 2024 (Vision Mamba, arXiv:2401.09417), Algorithm 1.
    """
    # Nested, as TorchScript compiles what stands behind an `and`.
    if not torch.jit.is_scripting():
        if torch.onnx.is_in_onnx_export():
            return onnx_graph.causal_conv(x, weights, reverse)
        if not torch.compiler.is_compiling():  # noqa: SIM102
            if is_transformed():
                return conv_reference.forward(x, weights, reverse)
    flat: list[Tensor] = []
    for weight, bias in weights:
        flat += [weight, bias]
    directions = [int(back) for back in reverse]
    return torch.ops.semivim.causal_conv(x, flat, directions, "auto" if backend is None else backend)
