"""The selective scan on GPUs, forward and backward, in Triton: no toolkit, no atomics, the same bits every time.

Dimensions: b images, l tokens, d channels, n states. One direction, or a pair of opposite directions whose walks
advance side by side from the two ends, so that nothing is flipped and the output is written once. State and sums are
float32 whatever the operands' dtypes. The kernels stand in `scan_kernels_triton` and `scan_adjoint_triton`.

What sums over channels or images (gradients of B, C, A, D, bias) is written per program and summed by one kernel in a
fixed order.

Few images leave most of a GPU idle, so the tokens are then cut into segments: a first kernel finds what each segment
does to a state (its sum of delta and its own contribution), a second chains them, and the segments run side by side.

Source: Gu & Dao 2023 (arXiv:2312.00752), Algorithm 2; Semi-ViM Eq. (1)-(3), (15)-(16).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import scan_adjoint_triton as adjoint
from . import scan_kernels_triton as kernels
from .launch_triton import ceil_div, check_size, launch, unavailable
from .scan_reference import Direction, direction_of, operands_of

__all__ = ["backward", "forward", "saved_size", "unavailable"]

# Fixed rather than tuned, so that results do not depend on a timing. Measured on one H200 at n = 16.
KEEP = 64  # tokens between two states that the forward keeps; a power of two, at least 8
AHEAD = 4  # tokens that the forward loads ahead, at most; divides PADDING twice
PADDING = 8  # the number of tokens is rounded up to a multiple of it
ENOUGH_WARPS = 3072  # fill a large GPU; below a quarter of them the tokens are cut, at the price of more exps
SPARE_ROWS = 4  # beside both ends of the rows [B | C], which are read a token ahead
WARP = 32
FORWARD_REGISTERS, BACKWARD_REGISTERS = 160, 168  # three warps on each of a multiprocessor's four schedulers
SUM_TOKENS, SUM_COLUMNS, SUM_SHARES = 32, 64, 32


class Layout(NamedTuple):
    """How the backward lays the states of a channel out over a warp."""

    states: int  # the next power of two
    lanes: int  # that share a channel
    repeats: int  # channels of a lane
    chunk: int  # tokens whose states are kept in registers

    @property
    def channels(self) -> int:
        """Channels of a warp."""
        return WARP // self.lanes * self.repeats

    @property
    def group(self) -> int:
        """Tokens whose gradients of [B | C] fill the lanes that share a channel group."""
        return min(self.chunk, max(1, WARP // (2 * self.states)))


@functools.cache
def layout_of(n: int) -> Layout:
    """Return the layout for n states; up to 16 of them, the states and decays of a chunk take about 70 registers."""
    states = triton.next_power_of_2(n)
    lanes = min(4, max(1, states // 4))
    each = states // lanes
    repeats = min(lanes, max(1, 8 // each))
    held = each * repeats
    return Layout(states, lanes, repeats, 8 if held <= 4 else 4)


class _Operands(NamedTuple):
    """The operands as the kernels read them; a single direction stands at both places of a pair."""

    u: tuple[Tensor, Tensor]
    delta: tuple[Tensor, Tensor]
    bc: tuple[Tensor, Tensor]
    A: tuple[Tensor, Tensor]
    D: tuple[Tensor, Tensor]
    bias: tuple[Tensor, Tensor]
    z: Tensor | None
    mix: Tensor | None
    pair: bool
    reverse: int  # 1 if the single direction runs from the last token to the first

    @property
    def pointers(self) -> tuple[Tensor | None, ...]:
        return *self.u, *self.delta, *self.A, *self.D, *self.bias, self.z, self.mix

    @property
    def strides(self) -> tuple[int, ...]:
        z = (0, 0) if self.z is None else self.z.stride()[:2]
        return *self.u[0].stride()[:2], *self.delta[0].stride()[:2], *z


def _alike(x: Tensor, y: Tensor, dense: bool) -> tuple[Tensor, Tensor]:
    """Both tensors with one dtype and one set of strides, the last 1 if `dense`; copied only where they are not so."""
    if x.dtype == y.dtype and x.stride() == y.stride() and (not dense or x.stride(-1) == 1):
        return x, y
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype).contiguous(), y.to(dtype).contiguous()


def _operands(directions: Sequence[Direction], z: Tensor | None, mix: Tensor | None) -> tuple[_Operands, bool]:
    """Return the operands, and whether the directions stand in the opposite order there."""
    if len(directions) > 2 or (len(directions) == 2 and directions[0].reverse == directions[1].reverse):
        orders = [f.reverse for f in directions]
        raise ValueError(f"the Triton scan takes one direction or two opposite ones, got reverse={orders}")
    f, g = directions[0], directions[-1]
    swapped = len(directions) == 2 and f.reverse
    if swapped:
        f, g = g, f
    if mix is not None:
        mix = (mix.flip(1) if swapped else mix).contiguous()
    if z is not None and z.stride(2) != 1:
        z = z.contiguous()
    u, delta = _alike(f.u, g.u, True), _alike(f.delta, g.delta, True)
    A, D, bias = (
        _alike(x.contiguous(), y.contiguous(), True) for x, y in ((f.A, g.A), (f.D, g.D), (f.delta_bias, g.delta_bias))
    )
    b, l, d = f.u.shape
    check_size(b, l * max(d, u[0].stride(1), delta[0].stride(1), 0 if z is None else z.stride(1)))
    return _Operands(
        u, delta, _alike(f.bc, g.bc, False), A, D, bias, z, mix, len(directions) == 2, int(f.reverse)
    ), swapped


class _Plan(NamedTuple):
    """Sizes that the kernels share."""

    images: int
    tokens: int
    padded: int
    channels: int
    constants: dict[str, Any]

    def new(self, device: torch.device, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)


def _plan(x: _Operands, softplus: bool) -> tuple[_Plan, Layout]:
    b, l, d = x.u[0].shape
    n = x.A[0].shape[1]
    layout = layout_of(n)
    constants = {"d": d, "n": n, "STATES": layout.states, "PAIR": x.pair, "SOFTPLUS": softplus}
    return _Plan(b, l, ceil_div(l, PADDING) * PADDING, d, constants), layout


def _options(warps: int, registers: int, plan: _Plan) -> dict[str, int]:
    """Options of a compilation; more than 16 states need all registers there are."""
    return {"num_warps": warps, "maxnreg": registers if plan.constants["STATES"] <= 16 else 255}


def _ahead(plan: _Plan) -> int:
    """Tokens that a walk unrolls; with many states fewer, as the time to compile grows with the cube of the text."""
    return min(AHEAD, max(1, 64 // plan.constants["STATES"]))


def segment_of(tokens: int, warps: int) -> int:
    """Return the tokens of a segment, a multiple of KEEP, for a launch of so many warps without segments."""
    chunks, wanted = ceil_div(tokens, KEEP), ENOUGH_WARPS // warps
    return KEEP * (ceil_div(chunks, min(chunks, wanted)) if wanted >= 4 else chunks)


def _rows(x: _Operands, plan: _Plan) -> Tensor:
    """Rows [B | C] in float32 as the kernels read them, with spare rows before and after."""
    states, directions = plan.constants["STATES"], 2 if x.pair else 1
    device = x.bc[0].device
    scratch = plan.new(device, (directions * plan.images * plan.padded + 2 * SPARE_ROWS) * 2 * states)
    rows = scratch[SPARE_ROWS * 2 * states :]
    launch(
        kernels.pack_rows, (ceil_div(plan.padded, 32), plan.images, directions),
        rows, *x.bc, *x.bc[0].stride(), plan.tokens, plan.padded,
        n=plan.constants["n"], STATES=states, TOKENS=32, options={"num_warps": 4},
    )  # fmt: skip
    return rows


def _entry(
    x: _Operands, plan: _Plan, rows: Tensor, source: tuple[Tensor, Tensor], segment: int, scale: float, against: bool
) -> Tensor:
    """States ``(b, directions, segments, n, d)`` that enter the segments, of the adjoint if `against`."""
    parts = ceil_div(plan.padded, segment)
    if parts == 1:
        return rows  # nothing enters, and nothing is read
    directions, n = 2 if x.pair else 1, plan.constants["n"]
    effect = plan.new(rows.device, plan.images, directions, parts, n, plan.channels)
    total = plan.new(rows.device, plan.images, directions, parts, plan.channels)
    entry = torch.empty_like(effect)
    launch(
        kernels.segment_effect, (ceil_div(plan.channels, WARP), plan.images, directions * parts),
        effect, total, rows, *source, *x.delta, *x.A, *x.bias, x.z if against else None, x.mix if against else None,
        *source[0].stride()[:2], *x.strides[2:], plan.tokens, plan.padded, segment, x.reverse, scale,
        **plan.constants, ADJOINT=against, T=_ahead(plan), options={"num_warps": 1},
    )  # fmt: skip
    launch(
        kernels.chain_segments, (ceil_div(plan.channels, 128), plan.images, directions * n),
        entry, effect, total, *x.A, parts, x.reverse,
        d=plan.channels, n=n, PAIR=x.pair, ADJOINT=against, BLOCK_D=128, options={"num_warps": 4},
    )  # fmt: skip
    return entry


def saved_size(tokens: int, channels: int, states: int, directions: int) -> int:
    """Return how many float32 values an image's forward keeps for its backward.

    These are the states ``(directions, borders, states, channels)`` at every KEEP-th token and, for a pair, the sum of
    both directions before the gate, ``(tokens, channels)``.
    """
    borders = ceil_div(tokens, KEEP) - 1
    return directions * borders * states * channels + (tokens * channels if directions == 2 else 0)


def forward(
    directions: Sequence[Direction], z: Tensor | None, mix: Tensor | None, scale: float, delta_softplus: bool
) -> tuple[Tensor, Tensor]:
    """Return the output ``(b, l, d)`` and what the backward needs, ``(b, saved_size(...))``.

    Raises:
        ValueError: If the directions are neither one nor two opposite ones, or the batch or an image is too large.
    """
    x, _ = _operands(directions, z, mix)
    plan, _ = _plan(x, delta_softplus)
    device = x.u[0].device
    shape = plan.images, plan.tokens, plan.channels
    out = torch.empty(shape, dtype=directions[0].u.dtype, device=device)
    size = saved_size(plan.tokens, plan.channels, plan.constants["n"], len(directions))
    saved = plan.new(device, plan.images, size)
    shares = plan.new(device, *shape) if x.pair and mix is not None else None
    rows = _rows(x, plan)
    blocks = ceil_div(plan.channels, WARP)
    segment = segment_of(plan.padded, plan.images * blocks * len(directions))
    entry = _entry(x, plan, rows, x.u, segment, scale, False)
    launch(
        kernels.scan_forward, (blocks, plan.images, ceil_div(plan.padded, segment)),
        out, saved, shares, entry, rows, *x.pointers,
        *x.strides, size, plan.tokens, plan.padded, segment, x.reverse, scale,
        **plan.constants, KEEP=KEEP, T=_ahead(plan), options=_options(len(directions), FORWARD_REGISTERS, plan),
    )  # fmt: skip
    return out, saved


def backward(
    grad: Tensor,
    directions: Sequence[Direction],
    z: Tensor | None,
    mix: Tensor | None,
    scale: float,
    delta_softplus: bool,
    saved: Tensor,
    dz: Tensor | None = None,
) -> tuple[list[Direction], Tensor | None]:
    """Return the gradients of the directions' operands and of z for the gradient of the output.

    All but grad and saved, which the forward returned, are those of the forward; see `semivim.ops.scan.scan`.
    """
    x, swapped = _operands(directions, z, mix)
    plan, layout = _plan(x, delta_softplus)
    grad = grad.contiguous()
    device = grad.device
    b, l, d = plan.images, plan.tokens, plan.channels
    n, count = plan.constants["n"], len(directions)
    read = x.u[0], x.delta[0], x.bc[0], x.A[0], x.D[0], x.bias[0]
    shapes = (b, l, d), (b, l, d), (b, l, 2 * n), (d, n), (d,), (d,)
    of = [
        [torch.empty(shape, dtype=y.dtype, device=device) for shape, y in zip(shapes, read, strict=True)]
        for _ in directions
    ]
    if z is not None and dz is None:
        dz = torch.empty((b, l, d), dtype=z.dtype, device=device)
    rows = _rows(x, plan)
    blocks = ceil_div(d, layout.channels)
    segment = segment_of(plan.padded, b * blocks * count)
    parts = ceil_div(plan.padded, segment)
    entry = _entry(x, plan, rows, (grad, grad), segment, scale, True)
    drows = plan.new(device, count, b, blocks, plan.padded, 2 * layout.states)
    dweights = plan.new(device, count, b * parts, d * (n + 2))
    notes = plan.new(
        device, b * count * parts * blocks, KEEP // layout.chunk, layout.states * layout.repeats // layout.lanes, WARP
    )
    f, g = of[0], of[-1]
    launch(
        adjoint.scan_backward, (blocks, b, count * parts),
        f[0], g[0], f[1], g[1], dz, drows, dweights, notes, grad, saved, entry, rows, *x.pointers,
        *x.strides, saved.stride(0), l, plan.padded, segment, x.reverse, scale,
        **plan.constants, KEEP=KEEP, CHUNK=layout.chunk, STATE_LANES=layout.lanes, REPEATS=layout.repeats,
        GROUP=layout.group, DZ_ROW=d if dz is None else dz.stride(1), options=_options(1, BACKWARD_REGISTERS, plan),
    )  # fmt: skip
    programs = count * (b * ceil_div(l, SUM_TOKENS) + ceil_div(d * (n + 2), SUM_COLUMNS))
    launch(
        adjoint.sum_partials, (programs, 1, 1),
        f[2], g[2], f[3], g[3], f[4], g[4], f[5], g[5], drows, dweights, b, blocks, parts, l, plan.padded, d,
        n=n, STATES=layout.states, PAIR=x.pair, TOKENS=SUM_TOKENS, COLUMNS=SUM_COLUMNS, SHARES=SUM_SHARES,
        options={"num_warps": 4},
    )  # fmt: skip
    if swapped:
        of.reverse()
    # A pair of different dtypes is read in a common one.
    return [
        direction_of((g.to(y.dtype) for g, y in zip(gradients, operands_of(f), strict=True)), f.reverse)
        for gradients, f in zip(of, directions, strict=True)
    ], dz
