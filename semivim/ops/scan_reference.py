"""The selective scan in plain torch, token by token: the text every faster backend is tested against.

Dimensions: b images, l tokens, d channels, n states. State and sums are float32 (float64 for float64 inputs).
Autograd can differentiate `forward`; `backward` writes the adjoint out, because the implementation of a custom op
cannot call autograd.

Source: Gu & Dao 2023 (arXiv:2312.00752), Algorithm 2; Semi-ViM Eq. (1)-(3), (15)-(16).
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .eager import deliver

# Tokens between two stored states. A forward returns, beside its output, the state after each chunk, so that a backward
# recomputes a chunk at a time.
CHUNK = 64


class Direction(NamedTuple):
    """Operands of one direction of the scan, or their gradients."""

    u: Tensor  # (b, l, d)
    delta: Tensor  # (b, l, d), step size before bias and softplus
    bc: Tensor  # (b, l, 2n), [B | C], input and read-out weights
    A: Tensor  # (d, n), decay rates, negative
    D: Tensor  # (d,), skip weights
    delta_bias: Tensor  # (d,)
    reverse: bool = False  # whether the scan runs from the last token to the first; results stay at their tokens


def operands_of(f: Direction) -> tuple[Tensor, ...]:
    """Return the six tensors of a direction."""
    return f.u, f.delta, f.bc, f.A, f.D, f.delta_bias


def direction_of(tensors: Iterable[Tensor], reverse: bool) -> Direction:
    """Return the direction of six tensors, the inverse of `operands_of`."""
    u, delta, bc, A, D, delta_bias = tensors
    return Direction(u, delta, bc, A, D, delta_bias, reverse)


def unavailable(device: torch.device) -> str | None:  # noqa: ARG001
    """Return why this backend cannot run on a device; the reference always can."""
    return None


def state_dtype(u: Tensor) -> torch.dtype:
    """Return the dtype of state and sums for an input."""
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def _tokens(length: int, reverse: bool) -> list[int]:
    return list(range(length - 1, -1, -1) if reverse else range(length))


def _recurrence(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t; s_t = <C_t, h_t>.

    Returns:
        s ``(b, l, d)``, the stored states ``(b, ceil(l / CHUNK), n, d)``, and h after each token in the order walked.
    """
    h = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    order = _tokens(u.shape[1], reverse)
    s: list[Tensor] = [h] * len(order)
    walked = []
    for t in order:
        decay = torch.exp(dt[:, t, :, None] * A)
        h = decay * h + (dt[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
        s[t] = (h * C[:, t, None, :]).sum(-1)
        walked.append(h)
    after_chunks = [walked[min(end, len(walked)) - 1] for end in range(CHUNK, len(walked) + CHUNK, CHUNK)]
    return torch.stack(s, 1), torch.stack(after_chunks, 1).transpose(2, 3).contiguous(), walked


def _recurrence_backward(
    ds: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool, walked: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Adjoint of `_recurrence`: gradients of u, dt, A, B, C for the gradient ds of s; `walked` is its third result."""
    g = torch.zeros_like(walked[0])
    dA = torch.zeros_like(A)
    du, ddt, dB, dC = torch.zeros_like(u), torch.zeros_like(dt), torch.zeros_like(B), torch.zeros_like(C)
    order = _tokens(u.shape[1], reverse)
    for step in range(len(order) - 1, -1, -1):
        t = order[step]
        h = walked[step]
        h_before = walked[step - 1] if step else torch.zeros_like(h)
        g = g + ds[:, t, :, None] * C[:, t, None, :]
        dC[:, t] = (ds[:, t, :, None] * h).sum(1)
        dB[:, t] = (g * (dt[:, t] * u[:, t])[:, :, None]).sum(1)
        into_input = (g * B[:, t, None, :]).sum(-1)
        g = g * torch.exp(dt[:, t, :, None] * A)
        into_decay = g * h_before
        du[:, t] = into_input * dt[:, t]
        ddt[:, t] = into_input * u[:, t] + (into_decay * A).sum(-1)
        dA = dA + (into_decay * dt[:, t, :, None]).sum(0)
    return du, ddt, dA, dB, dC


def _as(x: Tensor, operand: Tensor) -> Tensor:
    """A result in the dtype of what it belongs to, contiguous whatever the strides of the inputs."""
    return x.to(operand.dtype).contiguous()


class _Wide(NamedTuple):
    """Operands of one direction in the state's dtype."""

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    biased: Tensor  # the step size before softplus


def _widened(f: Direction, delta_softplus: bool) -> _Wide:
    u, delta, bc, A, D, bias = (x.to(state_dtype(f.u)) for x in operands_of(f))
    biased = delta + bias
    B, C = bc.chunk(2, -1)
    return _Wide(u, F.softplus(biased) if delta_softplus else biased, A, B, C, D, biased)


def last_state(f: Direction, delta_softplus: bool = True) -> Tensor:
    """sum_t exp(A sum_{s after t} dt_s) dt_t u_t B_t, the state after all tokens in the order of the scan.

    Args:
        f: Operands of the scan.
        delta_softplus: Whether softplus is applied to the biased step size.

    Returns:
        ``(b, d, n)``, float32 (float64 for float64 inputs).
    """
    u, dt, A, B, *_ = _widened(f, delta_softplus)
    so_far = dt.cumsum(1) if f.reverse else dt.flip(1).cumsum(1).flip(1)
    after = so_far - dt
    # One state at a time: all at once would take n times the memory of the input.
    states = [(torch.exp(after * A[:, j]) * (dt * u) * B[..., j, None]).sum(1) for j in range(A.shape[1])]
    return torch.stack(states, -1)


def saved_size(tokens: int, channels: int, states: int, directions: int) -> int:
    """Return the number of values that `forward` saves for `backward`, per image: the states after each chunk."""
    return directions * -(-tokens // CHUNK) * states * channels


def forward(
    directions: list[Direction], z: Tensor | None, mix: Tensor | None, scale: float, delta_softplus: bool
) -> tuple[Tensor, Tensor]:
    """Return the output ``(b, l, d)`` and the saved values ``(b, saved_size(...))``; see `semivim.ops.scan.scan`."""
    u = directions[0].u
    wide = state_dtype(u)
    total = torch.zeros(u.shape, dtype=wide, device=u.device)
    ungated = torch.zeros_like(total)
    saved = []
    for k, f in enumerate(directions):
        x = _widened(f, delta_softplus)
        s, states, _ = _recurrence(x.u, x.dt, x.A, x.B, x.C, f.reverse)
        total = total + s + x.D * x.u
        if mix is not None:
            ungated = ungated + mix[:, k].to(wide)[:, None, None] * s  # Semi-ViM Eq. (15), (16)
        saved.append(states.flatten(1))
    out = total if z is None else F.silu(z.to(wide)) * total
    return _as(scale * (out + ungated), u), torch.cat(saved, 1)


def backward(
    grad: Tensor,
    directions: list[Direction],
    z: Tensor | None,
    mix: Tensor | None,
    scale: float,
    delta_softplus: bool,
    saved: Tensor,  # noqa: ARG001
    dz: Tensor | None = None,
) -> tuple[list[Direction], Tensor | None]:
    """Return the gradients of each direction's operands and of z; mix has none."""
    wide = state_dtype(directions[0].u)
    dout = scale * grad.to(wide)
    gate = None if z is None else z.to(wide).contiguous()
    dy = dout if gate is None else dout * F.silu(gate)
    total = torch.zeros_like(dout)
    gradients = []
    for k, f in enumerate(directions):
        x = _widened(f, delta_softplus)
        s, _, walked = _recurrence(x.u, x.dt, x.A, x.B, x.C, f.reverse)
        total = total + s + x.D * x.u
        ds = dy if mix is None else dy + dout * mix[:, k].to(wide)[:, None, None]
        du, ddt, dA, dB, dC = _recurrence_backward(ds, x.u, x.dt, x.A, x.B, x.C, f.reverse, walked)
        ddelta = ddt * torch.sigmoid(x.biased) if delta_softplus else ddt
        dbc, dD, dbias = torch.cat((dB, dC), -1), (dy * x.u).sum((0, 1)), ddelta.sum((0, 1))
        of_direction = (du + x.D * dy, ddelta, dbc, dA, dD, dbias)
        like_operands = (_as(g, operand) for g, operand in zip(of_direction, operands_of(f), strict=True))
        gradients.append(direction_of(like_operands, f.reverse))
    of_z = None
    if z is not None and gate is not None:
        of_z = deliver(_as(torch.ops.aten.silu_backward(dout * total, gate), z), z.dtype, dz)
    return gradients, of_z
