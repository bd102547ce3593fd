"""The selective scan on GPUs, forward and backward, in Triton: no toolkit, no atomics, the same bits every time.

Dimensions: b images, l tokens, d channels, n states. A program owns one image and `BLOCK_D` channels, one channel a
lane with its n states in registers, and walks the tokens in order. Operands are read where they lie (channel-last,
any strides) in their own dtype; state and sums are float32; exp(x) is exp2 of x times log2(e), folded into A once.

Forward: both directions advance in the same loop from opposite ends. Until they meet each leaves its share of the
output in a scratch row; from there on each adds its own and finishes the token, so nothing is flipped and the output
is written once. Backward: one program a direction walks the chunks backwards, recomputes a chunk from its stored
state, keeping every `SUB`-th state in scratch and the states between in registers, and runs the adjoint. What sums
over channels or images (gradients of B, C, A, D, bias) is written per program and summed in fixed order.

Few images leave most of a GPU idle, so the tokens are then cut into segments: a first kernel finds what each segment
does to a state (exp(A sum delta) and its own contribution), a second chains them, and the segments run side by side.

Source: Gu & Dao 2023 (arXiv:2312.00752), Algorithm 2; Semi-ViM Eq. (1)-(3), (15)-(16).
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import scan_kernels_triton as kernels
from .scan_reference import CHUNK, Direction

# One warp, one channel a lane. Wider blocks would pass every sum over channels through shared memory.
BLOCK_D = 32
# Fixed rather than tuned, so that results do not depend on a timing.
LAUNCH = {"num_warps": 1, "enable_fp_fusion": True}
# Programs that fill a large GPU; below a quarter of them the tokens are cut, at the price of a second set of exps.
ENOUGH_PROGRAMS = 1024
# States of a channel that the backward keeps in registers: tokens times n.
SUB_STATES = 64
GATE_BLOCK = 1024
MOST_IMAGES = 65_535  # CUDA's limit of a grid's second and third dimension


def unavailable(device: torch.device) -> str:
    """Return why this backend cannot run on a device; a CPU can only interpret the kernels (TRITON_INTERPRET=1)."""
    if device.type == "cuda" or (device.type == "cpu" and triton.knobs.runtime.interpret):
        return ""
    return f"needs a CUDA device, got {device.type}"


class _Direction(NamedTuple):
    """Operands of one direction, channel-last."""

    u: Tensor
    delta: Tensor
    A: Tensor  # (d, n); (n, d) after _pair
    B: Tensor
    C: Tensor
    D: Tensor
    bias: Tensor


def _direction(f: Direction) -> _Direction:
    B, C = f.bc.chunk(2, -1)
    return _Direction(f.u, f.delta, f.A, B, C, f.D, f.delta_bias)


class _Plan(NamedTuple):
    """How a launch is cut."""

    blocks: int
    segment: int
    segments: int
    states: int


def _plan(u: Tensor, n: int, directions: int) -> _Plan:
    b, l, d = u.shape
    if b > MOST_IMAGES:
        raise ValueError(f"the Triton scan takes at most {MOST_IMAGES} images in a batch, got {b}")
    blocks, chunks = triton.cdiv(d, BLOCK_D), triton.cdiv(l, CHUNK)
    wanted = ENOUGH_PROGRAMS // (b * blocks * directions)
    chunks_each = triton.cdiv(chunks, wanted) if wanted >= 4 else chunks
    return _Plan(blocks, chunks_each * CHUNK, triton.cdiv(chunks, chunks_each), triton.next_power_of_2(n))


def _alike(*tensors: Tensor) -> list[Tensor]:
    """The tensors with one dtype and one set of strides, copied only if they differ."""
    first = tensors[0]
    if all(x.dtype == first.dtype and x.stride() == first.stride() for x in tensors):
        return list(tensors)
    dtype = first.dtype
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return [x.to(dtype).contiguous() for x in tensors]


def _pair(ahead: _Direction, back: _Direction) -> tuple[_Direction, _Direction]:
    """Both directions in the layout one launch can address: per operand one dtype and one set of strides."""
    rows = _alike(ahead.B, ahead.C, back.B, back.C)
    u, delta, A, D, bias = (
        _alike(getattr(ahead, name), getattr(back, name)) for name in ("u", "delta", "A", "D", "bias")
    )
    A = [x.t().contiguous() for x in A]
    D, bias = ([x.contiguous() for x in pair] for pair in (D, bias))
    return (
        _Direction(u[0], delta[0], A[0], rows[0], rows[1], D[0], bias[0]),
        _Direction(u[1], delta[1], A[1], rows[2], rows[3], D[1], bias[1]),
    )


def _strides(f: _Direction, z: Tensor) -> tuple[int, ...]:
    return (*f.u.stride(), *f.delta.stride(), *f.B.stride(), *z.stride())


def _entry(
    f: _Direction,
    g: _Direction,
    x: tuple[Tensor, Tensor],
    row: tuple[Tensor, Tensor],
    z: Tensor,
    mix: tuple[Tensor | None, Tensor | None],
    plan: _Plan,
    directions: int,
    scale: float,
    adjoint: bool,
    reverse: bool,
    softplus: bool,
    gated: bool,
) -> Tensor:
    """States ``(b, directions, segments, n, d)`` that enter the segments."""
    b, l, d = x[0].shape
    n = f.A.shape[0]
    effect = f.u.new_empty(b, directions, plan.segments, n, d, dtype=torch.float32)
    total = f.u.new_empty(b, directions, plan.segments, d, dtype=torch.float32)
    tile = {"STATES": plan.states, "BLOCK_D": BLOCK_D}
    kernels.segment_effect[(plan.blocks, b, directions * plan.segments)](
        effect, total, *x, f.delta, g.delta, f.A, g.A, *row, z, f.bias, g.bias, *mix,
        *x[0].stride(), *f.delta.stride(), *f.B.stride(), *z.stride(), l, d, n, plan.segment, plan.segments, scale,
        ADJOINT=adjoint, REVERSE=int(reverse), SOFTPLUS=softplus, GATED=gated, MIXED=adjoint and mix[0] is not None,
        **tile, **LAUNCH,
    )  # fmt: skip
    kernels.chain_segments[(plan.blocks, b, directions)](
        effect, total, f.A, g.A, d, n, plan.segments, ADJOINT=adjoint, REVERSE=int(reverse), **tile, **LAUNCH
    )
    return effect


def _weights(psi: Tensor | None, nu: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Weights of the hidden-state mix as the kernels read them, one after the other."""
    return None if psi is None else psi.contiguous(), None if nu is None else nu.contiguous()


def _zeros_for(x: Tensor | None, u: Tensor) -> Tensor:
    return u.new_zeros(u.shape[2], dtype=torch.float32) if x is None else x


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
    (b, l, d), n = u.shape, A.shape[1]
    f = _Direction(u, delta, A, B, C, _zeros_for(D, u), _zeros_for(delta_bias, u))
    f, _ = _pair(f, f)
    gate = f.u if z is None else z
    plan = _plan(u, n, 1)
    out = torch.empty_like(u, memory_format=torch.contiguous_format)
    states = u.new_empty(b, 1, triton.cdiv(l, CHUNK), n, d, dtype=torch.float32)
    with torch.cuda.device_of(u):
        entry = None
        if plan.segments > 1:
            entry = _entry(
                f, f, (f.u, f.u), (f.B, f.B), gate, (None, None), plan, 1, 1.0, False, reverse, delta_softplus, False
            )
        kernels.selective_forward[(plan.blocks, b, plan.segments)](
            out, states, entry, *f[:6], gate, f.bias, *_strides(f, gate), l, d, n, plan.segment,
            REVERSE=reverse, SOFTPLUS=delta_softplus, GATED=z is not None, SEGMENTED=plan.segments > 1,
            STATES=plan.states, BLOCK_D=BLOCK_D, CHUNK=CHUNK, **LAUNCH,
        )  # fmt: skip
    return out, states


def bidirectional_scan_forward(
    ahead: Direction, back: Direction, z: Tensor, psi: Tensor | None, nu: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the output ``(b, l, d)`` and the stored states ``(b, 2, ceil(l / CHUNK), n, d)``."""
    u = ahead.u
    (b, l, d), n = u.shape, ahead.A.shape[1]
    f, g = _pair(_direction(ahead), _direction(back))
    plan = _plan(u, n, 1)
    out = torch.empty_like(u, memory_format=torch.contiguous_format)
    partial = torch.empty_like(out, dtype=torch.float32)
    states = u.new_empty(b, 2, triton.cdiv(l, CHUNK), n, d, dtype=torch.float32)
    with torch.cuda.device_of(u):
        entry = None
        if plan.segments > 1:
            entry = _entry(f, g, (f.u, g.u), (f.B, g.B), z, (None, None), plan, 2, 1.0, False, False, True, False)
        kernels.bidirectional_forward[(plan.blocks, b, plan.segments)](
            out, states, entry, partial, f.u, g.u, f.delta, g.delta, f.A, g.A, f.B, f.C, g.B, g.C, f.D, g.D, z,
            f.bias, g.bias, *_weights(psi, nu), *_strides(f, z), l, d, n, plan.segment,
            MIXED=psi is not None, SEGMENTED=plan.segments > 1,
            STATES=plan.states, BLOCK_D=BLOCK_D, CHUNK=CHUNK, **LAUNCH,
        )  # fmt: skip
    return out, states


class _Gradients(NamedTuple):
    """Gradients of one direction, in the operands' dtypes."""

    u: Tensor
    delta: Tensor
    row: Tensor  # [B | C], float32
    A: Tensor
    D: Tensor
    bias: Tensor


def _backward(
    grad: Tensor,
    f: _Direction,
    g: _Direction,
    z: Tensor | None,
    mix: tuple[Tensor | None, Tensor | None],
    states: Tensor,
    scale: float,
    softplus: bool,
    reverse: bool,
) -> tuple[list[_Gradients], Tensor | None]:
    """Gradients of each direction (of one if the operands are the same) and of z."""
    (b, l, d), n = f.u.shape, f.A.shape[1]
    directions = states.shape[1]
    kinds = (f, g)[:directions]
    du = [torch.empty(b, l, d, dtype=x.u.dtype, device=grad.device) for x in kinds]
    ddelta = [torch.empty(b, l, d, dtype=x.delta.dtype, device=grad.device) for x in kinds]
    f, g = _pair(f, g)
    gate, grad = f.u if z is None else z, grad.contiguous()
    plan = _plan(f.u, n, directions)
    sub = max(1, min(4, SUB_STATES // plan.states))

    def scratch(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=grad.device)

    drow = scratch(directions, b, plan.blocks, l, 2 * n)
    dA = scratch(directions, b * plan.segments, n, d)
    dD, dbias = scratch(directions, b * plan.segments, d), scratch(directions, b * plan.segments, d)
    y = scratch(directions, b, l, d) if z is not None else drow
    kept = scratch(b * directions * plan.segments * plan.blocks, CHUNK // sub, plan.states, BLOCK_D)
    dz = None
    with torch.cuda.device_of(grad):
        entry = None
        if plan.segments > 1:
            entry = _entry(
                f, g, (grad, grad), (f.C, g.C), gate, mix, plan, directions, scale, True, reverse, softplus,
                z is not None,
            )  # fmt: skip
        kernels.scan_backward[(plan.blocks, b, directions * plan.segments)](
            du[0], du[-1], ddelta[0], ddelta[-1], drow, dA, dD, dbias, y, kept, grad, states, entry,
            f.u, g.u, f.delta, g.delta, f.A, g.A, f.B, f.C, g.B, g.C, f.D, g.D, gate, f.bias, g.bias, *mix,
            *_strides(f, gate), l, d, n, plan.segment, plan.segments, scale,
            REVERSE=int(reverse), SOFTPLUS=softplus, GATED=z is not None, MIXED=mix[0] is not None,
            SEGMENTED=plan.segments > 1, STATES=plan.states, BLOCK_D=BLOCK_D, CHUNK=CHUNK, SUB=sub, **LAUNCH,
        )  # fmt: skip
        if z is not None:
            dz = torch.empty_like(z, memory_format=torch.contiguous_format)
            kernels.gate_backward[(triton.cdiv(l * d, GATE_BLOCK), b)](
                dz, y, grad, z, *z.stride(), l * d, d, scale, BOTH=directions == 2, BLOCK=GATE_BLOCK,
                enable_fp_fusion=True,
            )  # fmt: skip
    # torch sums on a GPU in a fixed order, without atomics. Summed one by one, as gradients may not share memory.
    return [
        _Gradients(
            du[i],
            ddelta[i],
            drow[i].sum(1),
            dA[i].sum(0).t().to(x.A.dtype).contiguous(),
            dD[i].sum(0).to(x.D.dtype),
            dbias[i].sum(0).to(x.bias.dtype),
        )
        for i, x in enumerate(kinds)
    ], dz


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
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of u, delta, A, B, C, D, z, delta_bias."""
    f = _Direction(u, delta, A, B, C, _zeros_for(D, u), _zeros_for(delta_bias, u))
    (of,), dz = _backward(grad, f, f, z, (None, None), states, 1.0, delta_softplus, reverse)
    dB, dC = of.row.chunk(2, -1)
    return (
        of.u,
        of.delta,
        of.A,
        dB.to(B.dtype, copy=True, memory_format=torch.contiguous_format),
        dC.to(C.dtype, copy=True, memory_format=torch.contiguous_format),
        None if D is None else of.D,
        dz,
        None if delta_bias is None else of.bias,
    )


def bidirectional_scan_backward(
    grad: Tensor,
    ahead: Direction,
    back: Direction,
    z: Tensor,
    psi: Tensor | None,
    nu: Tensor | None,
    states: Tensor,
) -> tuple[Direction, Direction, Tensor]:
    """Return the gradients of `ahead`, `back` and z; psi and nu have none."""
    f, g = _direction(ahead), _direction(back)
    gradients, dz = _backward(grad, f, g, z, _weights(psi, nu), states, 0.5, True, False)
    assert dz is not None
    of_ahead, of_back = (
        Direction(of.u, of.delta, of.row.to(x.bc.dtype), of.A, of.D, of.bias)
        for of, x in zip(gradients, (ahead, back), strict=True)
    )
    return of_ahead, of_back, dz
