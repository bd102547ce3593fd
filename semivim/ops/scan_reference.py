"""The selective scan in plain torch, token by token: the text every faster backend is tested against.

Dimensions: b images, l tokens, d channels, n states. State and sums are float32 (float64 for float64 inputs).
The forward functions can be differentiated by autograd; the backward functions write the adjoint out, because the
implementation of a custom op cannot call autograd.

Source: Gu & Dao 2023 (arXiv:2312.00752), Algorithm 2; Semi-ViM Eq. (1)-(3), (15)-(16).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens between two stored states. A forward returns, beside its output, the state after each chunk, so that a backward
# recomputes a chunk at a time.
CHUNK = 64


class Direction(NamedTuple):
    """Operands of one direction of the bidirectional scan, or their gradients."""

    u: Tensor  # (b, l, d)
    delta: Tensor  # (b, l, d), before bias and softplus
    bc: Tensor  # (b, l, 2n), [B | C]
    A: Tensor  # (d, n)
    D: Tensor  # (d,)
    delta_bias: Tensor  # (d,)


def unavailable(device: torch.device) -> str:  # noqa: ARG001
    """Return why this backend cannot run on a device; the reference always can."""
    return ""


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
    """Adjoint of `_recurrence`: gradients of u, dt, A, B, C for the gradient ds of s."""
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


def _zeros_for(D: Tensor | None, u: Tensor) -> Tensor:
    return u.new_zeros(u.shape[2], dtype=state_dtype(u)) if D is None else D.to(state_dtype(u))


def _as(x: Tensor, operand: Tensor) -> Tensor:
    """A result in the dtype of what it belongs to, contiguous whatever the strides of the inputs."""
    return x.to(operand.dtype).contiguous()


def selective_scan_forward(
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
) -> tuple[Tensor, Tensor]:
    """Return the output ``(b, l, d)`` and the stored states ``(b, 1, ceil(l / CHUNK), n, d)``."""
    wide = state_dtype(u)
    x, raw = u.to(wide), delta.to(wide) + _zeros_for(delta_bias, u)
    dt = F.softplus(raw) if delta_softplus else raw
    s, states, _ = _recurrence(x, dt, A.to(wide), B.to(wide), C.to(wide), reverse)
    y = s + _zeros_for(D, u) * x
    out = y if z is None else y * F.silu(z.to(wide))
    return _as(out, u), states.unsqueeze(1)


def selective_scan_backward(
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
    states: Tensor,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of u, delta, A, B, C, D, z, delta_bias."""
    wide = state_dtype(u)
    x, raw, skip = u.to(wide), delta.to(wide) + _zeros_for(delta_bias, u), _zeros_for(D, u)
    dt = F.softplus(raw) if delta_softplus else raw
    operands = x, dt, A.to(wide), B.to(wide), C.to(wide)
    s, _, walked = _recurrence(*operands, reverse)
    dy = grad.to(wide)
    dz = None
    if z is not None:
        gate = z.to(wide).contiguous()
        dz = _as(torch.ops.aten.silu_backward(dy * (s + skip * x), gate), z)
        dy = dy * F.silu(gate)
    du, ddt, dA, dB, dC = _recurrence_backward(dy, *operands, reverse, walked)
    draw = ddt * torch.sigmoid(raw) if delta_softplus else ddt
    return (
        _as(du + skip * dy, u),
        _as(draw, delta),
        _as(dA, A),
        _as(dB, B),
        _as(dC, C),
        None if D is None else _as((dy * x).sum((0, 1)), D),
        dz,
        None if delta_bias is None else _as(draw.sum((0, 1)), delta_bias),
    )


def bidirectional_scan_forward(
    ahead: Direction, back: Direction, z: Tensor, psi: Tensor | None, nu: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the output ``(b, l, d)`` and the stored states ``(b, 2, ceil(l / CHUNK), n, d)``."""
    wide = state_dtype(ahead.u)
    s, skip, states = [], [], []
    for reverse, operands in enumerate((ahead, back)):
        x, step, row, decay, weight, bias = (operand.to(wide) for operand in operands)
        B, C = row.chunk(2, -1)
        readout, stored, _ = _recurrence(x, F.softplus(step + bias), decay, B, C, bool(reverse))
        s.append(readout)
        skip.append(weight * x)
        states.append(stored)
    out = F.silu(z.to(wide)) * (s[0] + skip[0] + s[1] + skip[1])
    if psi is not None and nu is not None:
        share = psi.to(wide)[:, None, None]
        out = out + nu.to(wide)[:, None, None] * (share * s[0] + (1 - share) * s[1])  # Semi-ViM Eq. (15), (16)
    return _as(0.5 * out, ahead.u), torch.stack(states, 1)


def bidirectional_scan_backward(
    grad: Tensor,
    ahead: Direction,
    back: Direction,
    z: Tensor,
    psi: Tensor | None,
    nu: Tensor | None,
    states: Tensor,  # noqa: ARG001
) -> tuple[Direction, Direction, Tensor]:
    """Return the gradients of `ahead`, `back` and z; psi and nu have none."""
    wide = state_dtype(ahead.u)
    gate, half = z.to(wide).contiguous(), 0.5 * grad.to(wide)
    gated = half * F.silu(gate)
    y = torch.zeros_like(gate)
    gradients = []
    for reverse, operands in enumerate((ahead, back)):
        x, step, row, decay, weight, bias = (operand.to(wide) for operand in operands)
        B, C = row.chunk(2, -1)
        dt = F.softplus(step + bias)
        s, _, walked = _recurrence(x, dt, decay, B, C, bool(reverse))
        y = y + s + weight * x
        ds = gated
        if psi is not None and nu is not None:
            share = (1 - psi if reverse else psi).to(wide)[:, None, None]
            ds = ds + half * nu.to(wide)[:, None, None] * share
        du, ddt, dA, dB, dC = _recurrence_backward(ds, x, dt, decay, B, C, bool(reverse), walked)
        draw = ddt * torch.sigmoid(step + bias)
        of_direction = (
            du + weight * gated,
            draw,
            torch.cat((dB, dC), -1),
            dA,
            (gated * x).sum((0, 1)),
            draw.sum((0, 1)),
        )
        gradients.append(Direction(*(_as(g, operand) for g, operand in zip(of_direction, operands, strict=True))))
    return *gradients, _as(torch.ops.aten.silu_backward(half * y, gate), z)  # type: ignore[return-value]
