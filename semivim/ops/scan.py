"""The selective scan over any number of directions: shape checks, choice of backend, custom ops.

Dimensions: b images, l tokens, d channels, n states, K directions. Tensors over tokens are channel-last, ``(b, l, d)``
and ``(b, l, 2n)``; only `selective_scan` takes mamba-ssm's ``(b, d, l)`` and passes transposed views.

A backend is a module `scan_<name>` (listed in `backends.py`) with the functions of `scan_reference`, of the same
signatures: `unavailable`, `saved_size`, `forward` and `backward`. Tensors come with any strides and may mix dtypes;
b, l and n are at least 1. Outputs and gradients are contiguous, freshly allocated, in the dtype of what they belong to,
and every element is written. `backward` writes the gradient of z to its last argument where it gets one: columns of
contiguous rows, in the dtype of z. `forward` also returns what its own `backward` needs, ``(b, saved_size(...))`` in
`state_dtype`: flat, because a dimension that is 1 for short inputs would tie an exported program to the length it saw.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import onnx_graph, scan_reference
from .backends import choose, of_forward, resolved_module
from .eager import differentiable_gradients, is_transformed
from .scan_reference import Direction, direction_of, last_state, operands_of, state_dtype

OPERANDS = 6  # tensors of a direction


def _check(name: str, x: Tensor | None, shape: tuple[int, ...], letters: str) -> None:
    if x is not None and tuple(x.shape) != shape:
        raise ValueError(f"{name} must be ({letters}) = {tuple(shape)}, got {tuple(x.shape)}")


def _check_kind(name: str, x: Tensor | None, u: Tensor) -> None:
    """Name an operand that kernels could not read."""
    if x is not None and x.device != u.device:
        raise ValueError(f"{name} must be on {u.device} as u is, got {x.device}")
    if x is not None and not x.is_floating_point():
        raise ValueError(f"{name} must have a real floating dtype, got {x.dtype}")


def _check_operands(operands: list[Tensor], reverse: list[int], z: Tensor | None, mix: Tensor | None) -> None:
    """Name the operand whose shape, device or dtype does not fit, by its direction."""
    if not reverse or len(operands) != OPERANDS * len(reverse):
        raise ValueError(f"directions must hold one or more of {OPERANDS} tensors each, got {len(operands)} tensors")
    u, A = operands[0], operands[3]
    if u.dim() != 3:
        raise ValueError(f"directions[0].u must be (b, l, d), got {tuple(u.shape)}")
    if A.dim() != 2 or A.shape[1] == 0:
        raise ValueError(f"directions[0].A must be (d, n) with n >= 1, got {tuple(A.shape)}")
    if u.shape[1] == 0:
        raise ValueError(f"directions[0].u must have at least one token, got {tuple(u.shape)}")
    b, l, d = u.shape
    n = A.shape[1]
    shapes = ((b, l, d), (b, l, d), (b, l, 2 * n), (d, n), (d,), (d,))
    letters = ("b, l, d", "b, l, d", "b, l, 2n", "d, n", "d", "d")
    for i, x in enumerate(operands):
        name = f"directions[{i // OPERANDS}].{Direction._fields[i % OPERANDS]}"
        _check_kind(name, x, u)
        _check(name, x, shapes[i % OPERANDS], letters[i % OPERANDS])
    _check_kind("z", z, u)
    _check("z", z, (b, l, d), "b, l, d")
    _check_kind("mix", mix, u)
    _check("mix", mix, (b, len(reverse)), "b, K")


def _directions(operands: list[Tensor], reverse: list[int]) -> list[Direction]:
    starts = range(0, len(operands), OPERANDS)
    return [direction_of(operands[i : i + OPERANDS], bool(back)) for i, back in zip(starts, reverse, strict=True)]


def _new(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _new_saved(operands: list[Tensor], directions: int, backend: str) -> Tensor:
    u, n = operands[0], operands[3].shape[1]
    size = resolved_module("scan", backend, u.device, u.dtype).saved_size(u.shape[1], u.shape[2], n, directions)
    return u.new_empty(u.shape[0], size, dtype=state_dtype(u))


@torch.library.custom_op("semivim::scan", mutates_args=())
def _scan(
    operands: list[Tensor],
    reverse: list[int],
    z: Tensor | None,
    mix: Tensor | None,
    scale: float,
    delta_softplus: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _check_operands(operands, reverse, z, mix)
    u = operands[0]
    module = choose("scan", backend, u.device, u.dtype)
    if u.numel() == 0:
        return _new(u), _new_saved(operands, len(reverse), backend)
    return module.forward(_directions(operands, reverse), z, mix, scale, delta_softplus)


@_scan.register_fake
def _scan_fake(operands, reverse, z, mix, scale, delta_softplus, backend):  # type: ignore[no-untyped-def]  # noqa: ARG001
    _check_operands(operands, reverse, z, mix)
    return _new(operands[0]), _new_saved(operands, len(reverse), backend)


@torch.library.custom_op("semivim::scan_backward", mutates_args=())
def _scan_backward(
    grad: Tensor,
    operands: list[Tensor],
    reverse: list[int],
    z: Tensor | None,
    mix: Tensor | None,
    scale: float,
    delta_softplus: bool,
    saved: Tensor,
    backend: str,
) -> list[Tensor]:
    """Gradients of the operands, and of z at the end where there is one."""
    u = operands[0]
    tensors = operands if z is None else [*operands, z]
    if u.numel() == 0:
        return [torch.zeros_like(x) for x in tensors]
    module = choose("scan", backend, u.device, u.dtype)
    size = module.saved_size(u.shape[1], u.shape[2], operands[3].shape[1], len(reverse))
    if saved.shape[1] != size:
        raise ValueError(
            f"the scan's backward in {module.__name__} must get {size} saved values an image, got {saved.shape[1]}: "
            "another backend ran the forward of this compiled program; compile it under the use_backend it runs under"
        )
    gradients, dz = module.backward(grad, _directions(operands, reverse), z, mix, scale, delta_softplus, saved)
    flat = [g for f in gradients for g in operands_of(f)]
    return flat if dz is None else [*flat, dz]


@_scan_backward.register_fake
def _scan_backward_fake(grad, operands, reverse, z, *_):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return [_new(x) for x in (operands if z is None else [*operands, z])]


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    operands, ctx.reverse, z, mix, ctx.scale, ctx.delta_softplus, backend = inputs
    ctx.backend = of_forward("scan", backend, operands[0].device, operands[0].dtype)
    ctx.set_materialize_grads(False)  # no zeros in the size of the saved values
    ctx.save_for_backward(*operands, z, mix, output[1])


def _differentiate(ctx, grad, _):  # type: ignore[no-untyped-def]
    *operands, z, mix, saved = ctx.saved_tensors
    if grad is None:
        return [None] * len(operands), None, None, None, None, None, None
    if torch.is_grad_enabled():  # by create_graph: the gradients are to be differentiated themselves

        def plain(*tensors: Tensor) -> Tensor:
            directions = _directions(list(tensors[: len(operands)]), ctx.reverse)
            gate = None if z is None else tensors[-1]
            return scan_reference.forward(directions, gate, mix, ctx.scale, ctx.delta_softplus)[0]

        gradients = differentiable_gradients(plain, operands if z is None else [*operands, z], grad)
        dz = None if z is None else gradients.pop()
        return gradients, None, dz, None, None, None, None
    gradients = torch.ops.semivim.scan_backward(
        grad, operands, ctx.reverse, z, mix, ctx.scale, ctx.delta_softplus, saved, ctx.backend
    )
    dz = None if z is None else gradients.pop()
    return gradients, None, dz, None, None, None, None


_scan.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.semivim.scan)
def scan_flops(operand_shapes, reverse, *_, **__) -> int:  # type: ignore[no-untyped-def]
    """Count 9 operations a state and token, as VMamba's and Mamba's authors do; multiply and add count apart."""
    b, l, d = operand_shapes[0]
    n = operand_shapes[3][1]
    return 9 * len(reverse) * b * l * d * n


@register_flop_formula(torch.ops.semivim.scan_backward)
def scan_backward_flops(grad_shape, operand_shapes, reverse, *_, **__) -> int:  # type: ignore[no-untyped-def]  # noqa: ARG001
    """Count twice the forward's operations, as torch does for products."""
    return 2 * scan_flops(operand_shapes, reverse)


def scan(
    directions: list[Direction],
    z: Tensor | None = None,
    mix: Tensor | None = None,
    scale: float = 1.0,
    delta_softplus: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Out = scale * (SiLU(z) sum_k (s_k + D_k u_k) + sum_k mix_k s_k), with s_k = <C, h> of direction k.

    Each direction is a selective scan, h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t with dt = softplus(delta + delta_bias),
    from the first token to the last or, with `reverse`, from the last to the first; results stay at their tokens, so
    nothing is flipped. The state is float32 whatever the inputs' dtype (float64 for float64 inputs).

    Args:
        directions: The operands of each direction. Rows may be strided (parts of a projection's output).
        z: Gate before SiLU, ``(b, l, d)``; None for no gate.
        mix: Weight of each direction's ungated read-out, ``(b, K)``; no gradient. Hidden-state mixing, which is linear
            in the states and adds no scan.
        scale: Factor of the sum.
        delta_softplus: Whether softplus is applied to the biased step size.
        backend: One of `available_backends`, or None to choose.

    Returns:
        ``(b, l, d)``, in the dtype of the first direction's ``u``.

    Raises:
        ValueError: If a shape, device or dtype does not fit, or the named backend cannot run.

    Source: Gu & Dao 2023 (arXiv:2312.00752), Algorithm 2; Semi-ViM Eq. (1)-(3), (15)-(16).
    Transforms of `torch.func`, forward-mode and second derivatives run token by token in plain torch.
    """
    # Nested, as TorchScript compiles what stands behind an `and`.
    if not torch.jit.is_scripting():
        if torch.onnx.is_in_onnx_export():
            return onnx_graph.scan(directions, z, mix, scale, delta_softplus)
        if not torch.compiler.is_compiling():  # noqa: SIM102
            if is_transformed():
                return scan_reference.forward(directions, z, mix, scale, delta_softplus)[0]
    operands: list[Tensor] = []
    reverse: list[int] = []
    for f in directions:
        operands += [f.u, f.delta, f.bc, f.A, f.D, f.delta_bias]
        reverse.append(int(f.reverse))
    name = "auto" if backend is None else backend
    return torch.ops.semivim.scan(operands, reverse, z, mix, scale, delta_softplus, name)[0]


def _check_rows(name: str, x: Tensor, shape: tuple[int, ...], letters: str) -> None:
    """Refuse the forms of B and C that mamba-ssm takes and this scan does not."""
    if x.dim() != 3:
        raise ValueError(
            f"{name} must be ({letters}), one row a token, got {tuple(x.shape)}: "
            f"constant (d, n) and grouped (b, groups, n, l) {name} are not supported"
        )
    _check(name, x, shape, letters)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    reverse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t;  y_t = (<C_t, h_t> + D u_t) * SiLU(z_t).

    One direction of `scan` in mamba-ssm's shapes and argument order. Channel-last memory, i.e. a transposed view of
    ``(b, l, d)``, is used without a copy, and is what the output holds.

    Args:
        u: Input, ``(b, d, l)``, any float dtype.
        delta: Step size, ``(b, d, l)``; positive unless ``delta_softplus``.
        A: Decay rates, ``(d, n)``, negative.
        B: Input weights, ``(b, n, l)``.
        C: Read-out weights, ``(b, n, l)``.
        D: Skip weights, ``(d,)``.
        z: Gate before SiLU, ``(b, d, l)``.
        delta_bias: Added to ``delta`` first, ``(d,)``.
        delta_softplus: Whether softplus is applied to the biased ``delta``.
        return_last_state: Also return the state after the last token in the order of the scan.
        reverse: Whether the recurrence runs from the last token to the first; outputs stay at their tokens.
        backend: One of `available_backends`, or None to choose.

    Returns:
        ``(b, d, l)``, in the dtype of ``u``; with ``return_last_state`` also the last state, float32 ``(b, d, n)``.

    Raises:
        ValueError: If a shape, device or dtype does not fit, or the named backend cannot run.

    Source: Gu & Dao 2023 (arXiv:2312.00752), Algorithm 2; mamba-ssm's `selective_scan_fn`.
    """
    if u.dim() != 3:
        raise ValueError(f"u must be (b, d, l), got {tuple(u.shape)}")
    if A.dim() != 2 or A.shape[1] == 0:
        raise ValueError(f"A must be (d, n) with n >= 1, got {tuple(A.shape)}")
    b, d, l = u.shape
    n = A.shape[1]
    if l == 0:
        raise ValueError(f"u must have at least one token, got (b, d, l) = {tuple(u.shape)}")
    for name, x in (("u", u), ("delta", delta), ("A", A), ("B", B), ("C", C), ("D", D), ("z", z)):
        _check_kind(name, x, u)
    _check_kind("delta_bias", delta_bias, u)
    _check("delta", delta, (b, d, l), "b, d, l")
    _check("A", A, (d, n), "d, n")
    _check_rows("B", B, (b, n, l), "b, n, l")
    _check_rows("C", C, (b, n, l), "b, n, l")
    _check("D", D, (d,), "d")
    _check("z", z, (b, d, l), "b, d, l")
    _check("delta_bias", delta_bias, (d,), "d")
    zeros = torch.zeros(d, dtype=A.dtype, device=u.device)
    direction = Direction(
        u.transpose(1, 2),
        delta.transpose(1, 2),
        torch.cat((B.transpose(1, 2), C.transpose(1, 2)), -1),
        A,
        zeros if D is None else D,
        zeros if delta_bias is None else delta_bias,
        reverse,
    )
    y = scan([direction], None if z is None else z.transpose(1, 2), None, 1.0, delta_softplus, backend).transpose(1, 2)
    if return_last_state:
        return y, last_state(direction, delta_softplus)
    return y
