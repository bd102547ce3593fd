"""The selective scan by mamba-ssm's CUDA kernels, where that package is installed.

Dimensions: b images, l tokens, d channels, n states. mamba-ssm scans rows ``(b, d, l)`` from the first token on, with
B and C shared by groups of channels. The two directions are therefore two groups of one call, the second on flipped
rows; gate, skip and the hidden-state mix are plain torch around it, in float32.

Its autograd function is called by its two halves, as an op may not differentiate inside itself; only names and
arguments that every release since 1.0 has are used. A backward repeats the forward, whose intermediates an op cannot
hand over. mamba-ssm does not give the states between chunks either: they are NaN, so that a backward by another
backend is loudly wrong. mamba-ssm adds gradients by atomics: theirs differ in the last bits from run to run.

Source: Gu & Dao 2023 (arXiv:2312.00752), Algorithm 2; Semi-ViM Eq. (1)-(3), (15)-(16).
"""

from typing import Any

import torch
import torch.nn.functional as F
from mamba_ssm.ops.selective_scan_interface import SelectiveScanFn
from torch import Tensor

from .scan_reference import CHUNK, Direction


def unavailable(device: torch.device) -> str:
    """Return why this backend cannot run on a device, "" if it can."""
    return "" if device.type == "cuda" else f"needs a CUDA device, got {device.type}"


class Context:
    """What an autograd function's forward leaves for its backward."""

    saved_tensors: tuple[Tensor | None, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


class _Scan:
    """One call of mamba-ssm for one or two directions, and its gradients.

    Args:
        operands: Per direction u ``(b, l, d)``, delta ``(b, l, d)``, A ``(d, n)``, B ``(b, l, n)``, C ``(b, l, n)``
            and the bias of delta ``(d,)`` or None.
        reverse: Per direction whether it runs from the last token to the first.
    """

    def __init__(self, operands: list[tuple[Any, ...]], reverse: tuple[bool, ...], softplus: bool) -> None:
        self.reverse = reverse
        u, delta, A, B, C, bias = zip(*operands, strict=True)
        dtype = u[0].dtype
        for x in (*u, *delta, *B, *C):
            dtype = torch.promote_types(dtype, x.dtype)
        self.context = Context()
        rows = [self._join(x).to(dtype) for x in (u, delta)]
        groups = [torch.stack(self._oriented(x), 1).transpose(2, 3).to(dtype).contiguous() for x in (B, C)]
        offset = None if bias[0] is None else torch.cat(bias).float()
        out = SelectiveScanFn.forward(self.context, *rows, torch.cat(A).float(), *groups, None, None, offset, softplus)
        self.s = [x.float() for x in self._split(out)]

    def backward(self, ds: list[Tensor]) -> list[list[Any]]:
        """Gradients of the six operands of each direction, for those of <C, h>."""
        dtype = self.context.saved_tensors[0].dtype  # type: ignore[union-attr]
        du, ddelta, dA, dB, dC, _, _, dbias, *_ = SelectiveScanFn.backward(self.context, self._join(ds).to(dtype))
        count = len(self.reverse)
        rows = [self._oriented([g.transpose(1, 2) for g in x.unbind(1)]) for x in (dB, dC)]
        of_bias = [None] * count if dbias is None else dbias.chunk(count)
        by_operand = (self._split(du), self._split(ddelta), dA.chunk(count), *rows, of_bias)
        return [list(direction) for direction in zip(*by_operand, strict=True)]

    def _oriented(self, x: Any) -> list[Tensor]:
        """Flip ``(b, l, *)`` of the directions that run back."""
        return [t.flip(1) if back else t for t, back in zip(x, self.reverse, strict=True)]

    def _join(self, x: Any) -> Tensor:
        return torch.cat(self._oriented(x), -1).transpose(1, 2).contiguous()

    def _split(self, x: Tensor) -> list[Tensor]:
        return self._oriented(x.transpose(1, 2).chunk(len(self.reverse), -1))


def _as(gradient: Tensor, operand: Tensor) -> Tensor:
    return gradient.to(operand.dtype, copy=True, memory_format=torch.contiguous_format)


def _no_states(u: Tensor, n: int, directions: int) -> Tensor:
    b, l, d = u.shape
    return u.new_full((b, directions, -(-l // CHUNK), n, d), torch.nan, dtype=torch.float32)


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
    """Return the output ``(b, l, d)`` and NaN states ``(b, 1, ceil(l / CHUNK), n, d)``."""
    y = _Scan([(u, delta, A, B, C, delta_bias)], (reverse,), delta_softplus).s[0]
    if D is not None:
        y = y + D.float() * u
    if z is not None:
        y = y * F.silu(z.float())
    return _as(y, u), _no_states(u, A.shape[1], 1)


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
    operands = (u, delta, A, B, C, delta_bias)
    scan = _Scan([operands], (reverse,), delta_softplus)
    dy, dz, dD = grad.float(), None, None
    if z is not None:
        y = scan.s[0] if D is None else scan.s[0] + D.float() * u
        dz = _as(torch.ops.aten.silu_backward(dy * y, z.float()), z)
        dy = dy * F.silu(z.float())
    (gradients,) = scan.backward([dy])
    if D is not None:
        gradients[0] = gradients[0] + D.float() * dy
        dD = _as((dy * u).sum((0, 1)), D)
    du, ddelta, dA, dB, dC, dbias = (None if x is None else _as(g, x) for g, x in zip(gradients, operands, strict=True))
    return du, ddelta, dA, dB, dC, dD, dz, dbias  # type: ignore[return-value]


def _both(ahead: Direction, back: Direction) -> _Scan:
    operands = [(f.u, f.delta, f.A, *f.bc.chunk(2, -1), f.delta_bias) for f in (ahead, back)]
    return _Scan(operands, (False, True), True)


def _mix(psi: Tensor | None, nu: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Weights ``(b, 1, 1)`` of both read-outs, Semi-ViM Eq. (15), (16)."""
    if psi is None or nu is None:
        return None
    share, strength = psi.float()[:, None, None], nu.float()[:, None, None]
    return strength * share, strength * (1 - share)


def bidirectional_scan_forward(
    ahead: Direction, back: Direction, z: Tensor, psi: Tensor | None, nu: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the output ``(b, l, d)`` and NaN states ``(b, 2, ceil(l / CHUNK), n, d)``."""
    s, s_b = _both(ahead, back).s
    out = F.silu(z.float()) * (s + ahead.D.float() * ahead.u + s_b + back.D.float() * back.u)
    mix = _mix(psi, nu)
    if mix is not None:
        out = out + mix[0] * s + mix[1] * s_b
    return _as(0.5 * out, ahead.u), _no_states(ahead.u, ahead.A.shape[1], 2)


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
    scan = _both(ahead, back)
    half = 0.5 * grad.float()
    gated = half * F.silu(z.float())
    y = sum(s + f.D.float() * f.u for s, f in zip(scan.s, (ahead, back), strict=True))
    mix = _mix(psi, nu)
    ds = [gated, gated] if mix is None else [gated + half * weight for weight in mix]
    directions = []
    for f, (du, ddelta, dA, dB, dC, dbias) in zip((ahead, back), scan.backward(ds), strict=True):
        of = du + f.D.float() * gated, ddelta, torch.cat((dB, dC), -1), dA, (gated * f.u).sum((0, 1)), dbias
        directions.append(Direction(*(_as(g, x) for g, x in zip(of, f, strict=True))))
    return *directions, _as(torch.ops.aten.silu_backward(half * y, z.float()), z)  # type: ignore[return-value]
