"""The selective scan and its bidirectional, gated form: shape checks, choice of backend, custom ops.

Dimensions: b images, l tokens, d channels, n states. The custom ops `semivim::selective_scan` and
`semivim::bidirectional_scan` hold memory channel-last, ``(b, l, d)`` and ``(b, l, n)``; `selective_scan` takes
mamba-ssm's ``(b, d, l)`` and passes transposed views.

A backend is a module `scan_<name>` (listed in `backends.py`) with five functions, signatures as in `scan_reference`:
    unavailable(device) -> str                    why it cannot run there, "" if it can
    selective_scan_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse) -> (out, states)
    selective_scan_backward(grad, <the ten above>, states) -> gradients of the eight tensors, None for absent ones
    bidirectional_scan_forward(ahead, back, z, psi, nu) -> (out, states)
    bidirectional_scan_backward(grad, <the five above>, states) -> gradients of ahead, back (a `Direction` each) and z
Tensors are channel-last with any strides and may mix dtypes. Outputs and gradients are contiguous, freshly allocated,
in the dtype of what they belong to; every element is written; l >= 1 and b >= 1. `states`, contiguous,
``(b, directions, ceil(l / CHUNK), n, d)``, in `state_dtype`, are the states after each chunk of tokens, counted in the
direction of the scan; forward and backward may run in different backends, so all store the same thing. The ops flatten
them to ``(b, -1)``: a dimension that is 1 for short inputs would tie an exported program to the length it saw.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .backends import choose, of_forward
from .scan_reference import CHUNK, Direction, state_dtype


def _check(name: str, x: Tensor | None, shape: tuple[int, ...], letters: str) -> None:
    if x is not None and tuple(x.shape) != shape:
        raise ValueError(f"{name} must be ({letters}) = {tuple(shape)}, got {tuple(x.shape)}")


def _check_kind(u: Tensor, operands: dict[str, Tensor | None]) -> None:
    """Name the operand that kernels could not read."""
    for name, x in operands.items():
        if x is not None and x.device != u.device:
            raise ValueError(f"{name} must be on {u.device} as u is, got {x.device}")
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{name} must have a real floating dtype, got {x.dtype}")


def _check_input(u: Tensor, A: Tensor) -> None:
    if u.dim() != 3:
        raise ValueError(f"u must have 3 dimensions, got {tuple(u.shape)}")
    if A.dim() != 2 or A.shape[1] == 0:
        raise ValueError(f"A must be (d, n) with n >= 1, got {tuple(A.shape)}")
    if u.shape[1] == 0:
        raise ValueError(f"u must have at least one token, got {tuple(u.shape)} channel-last")


def _check_selective(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, bias: Tensor | None
) -> None:
    """Name the argument of `selective_scan` whose shape does not fit, in that function's channel-first letters."""
    _check_input(u, A)
    _check_kind(u, {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": bias})
    b, l, d = u.shape
    n = A.shape[1]
    _check("A", A, (d, n), "d, n")
    for name, x, rows, letters in (
        ("delta", delta, d, "b, d, l"),
        ("z", z, d, "b, d, l"),
        ("B", B, n, "b, n, l"),
        ("C", C, n, "b, n, l"),
    ):
        _check(name, None if x is None else x.transpose(1, 2) if x.dim() == 3 else x, (b, rows, l), letters)
    _check("D", D, (d,), "d")
    _check("delta_bias", bias, (d,), "d")


def _check_bidirectional(
    u: Tensor,
    u_b: Tensor,
    delta: Tensor,
    delta_b: Tensor,
    bc: Tensor,
    bc_b: Tensor,
    z: Tensor,
    A: Tensor,
    A_b: Tensor,
    D: Tensor,
    D_b: Tensor,
    delta_bias: Tensor,
    delta_bias_b: Tensor,
    psi: Tensor | None,
    nu: Tensor | None,
) -> None:
    """Name the argument of `bidirectional_scan` whose shape does not fit."""
    _check_input(u, A)
    _check_kind(u, {"u": u, "u_b": u_b, "delta": delta, "delta_b": delta_b, "bc": bc, "bc_b": bc_b, "z": z, "A": A})
    _check_kind(u, {"A_b": A_b, "D": D, "D_b": D_b, "delta_bias": delta_bias, "delta_bias_b": delta_bias_b})
    _check_kind(u, {"psi": psi, "nu": nu})
    b, l, d = u.shape
    n = A.shape[1]
    for name, x in (("u_b", u_b), ("delta", delta), ("delta_b", delta_b), ("z", z)):
        _check(name, x, (b, l, d), "b, l, d")
    for name, x in (("bc", bc), ("bc_b", bc_b)):
        _check(name, x, (b, l, 2 * n), "b, l, 2n")
    for name, x in (("A", A), ("A_b", A_b)):
        _check(name, x, (d, n), "d, n")
    for name, x in (("D", D), ("D_b", D_b), ("delta_bias", delta_bias), ("delta_bias_b", delta_bias_b)):
        _check(name, x, (d,), "d")
    if (psi is None) != (nu is None):
        raise ValueError(f"psi and nu must be given together, got psi={psi is not None}, nu={nu is not None}")
    _check("psi", psi, (b,), "b")
    _check("nu", nu, (b,), "b")


def _new_states(u: Tensor, A: Tensor, directions: int) -> Tensor:
    b, l, d = u.shape
    return u.new_empty(b, directions * ((l + CHUNK - 1) // CHUNK) * A.shape[1] * d, dtype=state_dtype(u))


def _unflatten(states: Tensor, u: Tensor, A: Tensor, directions: int) -> Tensor:
    return states.view(u.shape[0], directions, -1, A.shape[1], u.shape[2])


def _contiguous_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)


@torch.library.custom_op("semivim::selective_scan", mutates_args=())
def _selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _check_selective(u, delta, A, B, C, D, z, delta_bias)
    module = choose("scan", backend, u.device, u.dtype)
    if u.numel() == 0:
        return _contiguous_like(u)[0], _new_states(u, A, 1)
    out, states = module.selective_scan_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    return out, states.view(states.shape[0], -1)


@_selective_scan.register_fake
def _selective_scan_fake(  # type: ignore[no-untyped-def]
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias, *_
) -> tuple[Tensor, Tensor]:
    _check_selective(u, delta, A, B, C, D, z, delta_bias)
    return _contiguous_like(u)[0], _new_states(u, A, 1)


@torch.library.custom_op("semivim::selective_scan_backward", mutates_args=())
def _selective_scan_backward(
    grad: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    states: Tensor,
    backend: str,
) -> list[Tensor]:
    """Gradients of the eight tensors; an absent one's place holds an empty tensor, as an op cannot return None."""
    module = choose("scan", backend, u.device, u.dtype)
    if u.numel() == 0:
        return [u.new_zeros(0) if x is None else torch.zeros_like(x) for x in (u, delta, A, B, C, D, z, delta_bias)]
    gradients = module.selective_scan_backward(
        grad, u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, _unflatten(states, u, A, 1)
    )
    return [u.new_empty(0) if gradient is None else gradient for gradient in gradients]


@_selective_scan_backward.register_fake
def _selective_scan_backward_fake(grad: Tensor, u: Tensor, *rest: Tensor | None) -> list[Tensor]:  # noqa: ARG001
    return [u.new_empty(0) if x is None else _contiguous_like(x)[0] for x in (u, *rest[:7])]


def _save_selective(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.delta_softplus, ctx.reverse, backend = inputs
    ctx.backend = of_forward("scan", backend, tensors[0].device, tensors[0].dtype)
    ctx.set_materialize_grads(False)  # no zeros in the size of the states
    ctx.save_for_backward(*tensors, output[1])


def _differentiate_selective(ctx, grad, _):  # type: ignore[no-untyped-def]
    *tensors, states = ctx.saved_tensors
    if grad is None:
        return (None,) * 11
    gradients = torch.ops.semivim.selective_scan_backward(
        grad, *tensors, ctx.delta_softplus, ctx.reverse, states, ctx.backend
    )
    return (*(None if x is None else g for x, g in zip(tensors, gradients, strict=True)), None, None, None)


_selective_scan.register_autograd(_differentiate_selective, setup_context=_save_selective)


def split_directions(operands: Sequence[Tensor]) -> tuple[Direction, Direction, Tensor]:
    """Sort the thirteen tensors of `bidirectional_scan` by direction; z is shared."""
    ahead, back = (Direction(*operands[k:6:2], *operands[7 + k : 13 : 2]) for k in (0, 1))
    return ahead, back, operands[6]


def join_directions(ahead: Direction, back: Direction, z: Tensor) -> list[Tensor]:
    """Undo `split_directions`."""
    pairs = [x for pair in zip(ahead, back, strict=True) for x in pair]
    return [*pairs[:6], z, *pairs[6:]]


@torch.library.custom_op("semivim::bidirectional_scan", mutates_args=())
def _bidirectional_scan(
    u: Tensor,
    u_b: Tensor,
    delta: Tensor,
    delta_b: Tensor,
    bc: Tensor,
    bc_b: Tensor,
    z: Tensor,
    A: Tensor,
    A_b: Tensor,
    D: Tensor,
    D_b: Tensor,
    delta_bias: Tensor,
    delta_bias_b: Tensor,
    psi: Tensor | None,
    nu: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    operands = u, u_b, delta, delta_b, bc, bc_b, z, A, A_b, D, D_b, delta_bias, delta_bias_b
    _check_bidirectional(*operands, psi, nu)
    module = choose("scan", backend, u.device, u.dtype)
    if u.numel() == 0:
        return _contiguous_like(u)[0], _new_states(u, A, 2)
    out, states = module.bidirectional_scan_forward(*split_directions(operands), psi, nu)
    return out, states.view(states.shape[0], -1)


@_bidirectional_scan.register_fake
def _bidirectional_scan_fake(*operands) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    _check_bidirectional(*operands[:15])
    u, A = operands[0], operands[7]
    return _contiguous_like(u)[0], _new_states(u, A, 2)


@torch.library.custom_op("semivim::bidirectional_scan_backward", mutates_args=())
def _bidirectional_scan_backward(
    grad: Tensor,
    u: Tensor,
    u_b: Tensor,
    delta: Tensor,
    delta_b: Tensor,
    bc: Tensor,
    bc_b: Tensor,
    z: Tensor,
    A: Tensor,
    A_b: Tensor,
    D: Tensor,
    D_b: Tensor,
    delta_bias: Tensor,
    delta_bias_b: Tensor,
    psi: Tensor | None,
    nu: Tensor | None,
    states: Tensor,
    backend: str,
) -> list[Tensor]:
    """Gradients of the thirteen tensors before psi."""
    operands = u, u_b, delta, delta_b, bc, bc_b, z, A, A_b, D, D_b, delta_bias, delta_bias_b
    module = choose("scan", backend, u.device, u.dtype)
    if u.numel() == 0:
        return [torch.zeros_like(x) for x in operands]
    states = _unflatten(states, u, A, 2)
    return join_directions(*module.bidirectional_scan_backward(grad, *split_directions(operands), psi, nu, states))


@_bidirectional_scan_backward.register_fake
def _bidirectional_scan_backward_fake(grad: Tensor, *operands) -> list[Tensor]:  # type: ignore[no-untyped-def]  # noqa: ARG001
    return list(_contiguous_like(*operands[:13]))


def _save_bidirectional(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, backend = inputs
    ctx.backend = of_forward("scan", backend, tensors[0].device, tensors[0].dtype)
    ctx.set_materialize_grads(False)  # no zeros in the size of the states
    ctx.save_for_backward(*tensors, output[1])


def _differentiate_bidirectional(ctx, grad, _):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 16
    return (
        *torch.ops.semivim.bidirectional_scan_backward(grad, *ctx.saved_tensors, ctx.backend),
        None,
        None,
        None,
    )


_bidirectional_scan.register_autograd(_differentiate_bidirectional, setup_context=_save_bidirectional)


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
    reverse: bool = False,
    backend: str | None = None,
) -> Tensor:
    """h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t;  y_t = (<C_t, h_t> + D u_t) * SiLU(z_t).

    The state is float32 whatever the inputs' dtype (float64 for float64 inputs). Channel-last memory, i.e. a
    transposed view of ``(b, l, d)``, is used without a copy, and is what the output holds.

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
        reverse: Whether the recurrence runs from the last token to the first; outputs stay at their tokens.
        backend: One of `available_backends`, or None to choose.

    Returns:
        ``(b, d, l)``, in the dtype of ``u``.

    Raises:
        ValueError: If a shape, device or dtype does not fit, or the named backend cannot run.

    Source: Gu & Dao 2023 (arXiv:2312.00752), Algorithm 2, with mamba-ssm's argument order.
    """
    out = torch.ops.semivim.selective_scan(
        u.transpose(1, 2),
        delta.transpose(1, 2),
        A,
        B.transpose(1, 2),
        C.transpose(1, 2),
        D,
        None if z is None else z.transpose(1, 2),
        delta_bias,
        delta_softplus,
        reverse,
        "auto" if backend is None else backend,
    )
    return out[0].transpose(1, 2)


def bidirectional_scan(
    u: Tensor,
    u_b: Tensor,
    delta: Tensor,
    delta_b: Tensor,
    bc: Tensor,
    bc_b: Tensor,
    z: Tensor,
    A: Tensor,
    A_b: Tensor,
    D: Tensor,
    D_b: Tensor,
    delta_bias: Tensor,
    delta_bias_b: Tensor,
    psi: Tensor | None = None,
    nu: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return (SiLU(z) (s + D u + s_b + D_b u_b) + nu (psi s + (1 - psi) s_b)) / 2.

    s is the read-out <C_t, h_t> of a selective scan with softplus(delta + delta_bias) over the tokens in order, s_b
    that of a second one with the ``*_b`` operands from the last token to the first; both stay at their tokens, so
    nothing is flipped. The nu term, hidden-state mixing, is linear in the states and adds no scan. Rows may be strided
    (``z`` a part of the input projection's output, ``bc`` of another's).

    Args:
        u: Input of the forward direction, ``(b, l, d)``, any float dtype.
        u_b: Input of the backward direction, ``(b, l, d)``.
        delta: Step size before bias and softplus, ``(b, l, d)``.
        delta_b: The same for the backward direction, ``(b, l, d)``.
        bc: Input and read-out weights side by side, ``(b, l, 2n)``.
        bc_b: The same for the backward direction, ``(b, l, 2n)``.
        z: Gate before SiLU, shared by both directions, ``(b, l, d)``.
        A: Decay rates, ``(d, n)``, negative.
        A_b: Decay rates of the backward direction, ``(d, n)``, negative.
        D: Skip weights, ``(d,)``.
        D_b: Skip weights of the backward direction, ``(d,)``.
        delta_bias: Bias of ``delta``, ``(d,)``.
        delta_bias_b: Bias of ``delta_b``, ``(d,)``.
        psi: Share of the forward direction in the hidden-state mix, ``(b,)``, in [0, 1]; no gradient.
        nu: Weight of the hidden-state mix, ``(b,)``; no gradient. Given together with ``psi`` or not at all.
        backend: One of `available_backends`, or None to choose.

    Returns:
        ``(b, l, d)``, in the dtype of ``u``.

    Raises:
        ValueError: If a shape, device or dtype does not fit, or the named backend cannot run.

    Source: Semi-ViM Eq. (1)-(3), (15)-(16); the halving is that of Vim's released models.
    """
    return torch.ops.semivim.bidirectional_scan(
        u,
        u_b,
        delta,
        delta_b,
        bc,
        bc_b,
        z,
        A,
        A_b,
        D,
        D_b,
        delta_bias,
        delta_bias_b,
        psi,
        nu,
        "auto" if backend is None else backend,
    )[0]
