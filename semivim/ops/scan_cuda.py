"""The selective scan by mamba-ssm's CUDA kernels, where that package is installed.

Dimensions: b images, l tokens, d channels, n states. mamba-ssm scans rows ``(b, d, l)`` from the first token on, with
B and C shared by groups of channels. The directions are therefore groups of one call, the backward ones on flipped
rows; gate, skip and the hidden-state mix are plain torch around it, in float32.

Its autograd function is called by its two halves, as an op may not differentiate inside itself; only names and
arguments that every release since 1.0 has are used. A backward repeats the forward, whose intermediates an op cannot
hand over. mamba-ssm adds gradients by atomics: theirs differ in the last bits from run to run.

Source: Gu & Dao 2023 (arXiv:2312.00752), Algorithm 2; Semi-ViM Eq. (1)-(3), (15)-(16).
"""

from typing import Any

import torch
import torch.nn.functional as F
from mamba_ssm.ops.selective_scan_interface import SelectiveScanFn
from torch import Tensor

from .cuda_call import Context
from .cuda_call import unavailable as unavailable
from .eager import deliver
from .scan_reference import Direction, direction_of, operands_of


class _Scan:
    """One call of mamba-ssm for all directions, and its gradients.

    Args:
        operands: Per direction u ``(b, l, d)``, delta ``(b, l, d)``, A ``(d, n)``, B ``(b, l, n)``, C ``(b, l, n)``
            and the bias of delta ``(d,)``.
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
        decay, offset = torch.cat(A).float(), torch.cat(bias).float()
        out = SelectiveScanFn.forward(self.context, *rows, decay, *groups, None, None, offset, softplus)
        self.s = [x.float() for x in self._split(out)]

    def backward(self, ds: list[Tensor]) -> list[list[Any]]:
        """Gradients of the six operands of each direction, for those of <C, h>."""
        dtype = self.context.saved_tensors[0].dtype  # type: ignore[union-attr]
        du, ddelta, dA, dB, dC, _, _, dbias, *_ = SelectiveScanFn.backward(self.context, self._join(ds).to(dtype))
        count = len(self.reverse)
        rows = [self._oriented([g.transpose(1, 2) for g in x.unbind(1)]) for x in (dB, dC)]
        by_operand = (self._split(du), self._split(ddelta), dA.chunk(count), *rows, dbias.chunk(count))
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


def _scan_of(directions: list[Direction], delta_softplus: bool) -> _Scan:
    operands = [(f.u, f.delta, f.A, *f.bc.chunk(2, -1), f.delta_bias) for f in directions]
    return _Scan(operands, tuple(f.reverse for f in directions), delta_softplus)


def _weight(mix: Tensor, k: int) -> Tensor:
    """Weight ``(b, 1, 1)`` of a direction's ungated read-out, Semi-ViM Eq. (15), (16)."""
    return mix[:, k].float()[:, None, None]


def _read_out(s: list[Tensor], directions: list[Direction]) -> Tensor:
    """sum_k (s_k + D_k u_k), ``(b, l, d)``."""
    terms = [s_k + f.D.float() * f.u for s_k, f in zip(s, directions, strict=True)]
    return sum(terms[1:], terms[0])


def saved_size(tokens: int, channels: int, states: int, directions: int) -> int:  # noqa: ARG001
    """Return the number of values that `forward` saves for `backward`, per image: none, as mamba-ssm gives none."""
    return 0


def forward(
    directions: list[Direction], z: Tensor | None, mix: Tensor | None, scale: float, delta_softplus: bool
) -> tuple[Tensor, Tensor]:
    """Return the output ``(b, l, d)`` and no saved values, ``(b, 0)``."""
    s = _scan_of(directions, delta_softplus).s
    out = _read_out(s, directions)
    if z is not None:
        out = F.silu(z.float()) * out
    if mix is not None:
        for k, s_k in enumerate(s):
            out = out + _weight(mix, k) * s_k
    u = directions[0].u
    return _as(scale * out, u), u.new_empty(u.shape[0], 0, dtype=torch.float32)


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
    scan = _scan_of(directions, delta_softplus)
    dout = scale * grad.float()
    dy, of_z = dout, None
    if z is not None:
        y = _read_out(scan.s, directions)
        dy = dout * F.silu(z.float())
        of_z = deliver(_as(torch.ops.aten.silu_backward(dout * y, z.float()), z), z.dtype, dz)
    ds = [dy if mix is None else dy + dout * _weight(mix, k) for k in range(len(directions))]
    gradients = []
    for f, (du, ddelta, dA, dB, dC, dbias) in zip(directions, scan.backward(ds), strict=True):
        of = du + f.D.float() * dy, ddelta, torch.cat((dB, dC), -1), dA, (dy * f.u).sum((0, 1)), dbias
        like_operands = (_as(g, x) for g, x in zip(of, operands_of(f), strict=True))
        gradients.append(direction_of(like_operands, f.reverse))
    return gradients, of_z
