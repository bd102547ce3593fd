"""Triton kernels of the selective scan's forward pass, and of the states at which segments of it begin.

Dimensions: b images, l tokens (l_pad when padded), d channels, n states (STATES when padded to a power of two). A lane
of a warp owns a channel and holds its states in registers: a tuple of tiles ``(lanes, WIDTH)``, WIDTH = 4 as far as
there are so many. State and sums are float32. exp(x) is exp2 of x log2(e), with log2(e) folded into A once.

Tokens past the last have delta = 0 and zero rows, which leave a state as it is; they stand after token l - 1, whichever
way a walk goes. Border i lies between the tokens (i + 1) KEEP - 1 and (i + 1) KEEP; the state with which a walk crosses
it is kept for the backward.
"""
# mypy: ignore-errors
# Triton reads its kernels, not Python: arguments are pointers or tiles.

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LANES = tl.constexpr(32)  # of a warp

# Integers whose value, and tensors whose alignment, make no other kernel.
OPERANDS = (
    *("u", "u_b", "delta", "delta_b", "A", "A_b", "D", "D_b", "bias", "bias_b", "z", "mix", "grad", "saved", "entry"),
    "dz",
)
INTEGERS = (
    *("u_image", "u_token", "delta_image", "delta_token", "z_image", "z_token", "bc_image", "bc_token", "bc_state"),
    *("x_image", "x_token", "saved_image", "images", "l", "l_pad", "segment", "reverse", "blocks", "parts", "scale"),
)


@triton.jit
def softplus(x):
    """max(x, 0) + log1p(e), e = exp(-|x|); log1p(e) / e is a polynomial on [0, 1] with a relative error of 2e-7."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    p = e * 0.005253457929939032 - 0.02958850748836994
    p = p * e + 0.07836166769266129
    p = p * e - 0.13674770295619965
    p = p * e + 0.19111430644989014
    p = p * e - 0.24844369292259216
    p = p * e + 0.33319270610809326
    p = p * e - 0.49999502301216125
    p = p * e + 1.0
    return tl.maximum(x, 0.0) + e * p


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def step_size(raw, exists, SOFTPLUS: tl.constexpr):
    """Return delta of a token, 0 where the token does not exist."""
    return tl.where(exists, softplus(raw) if SOFTPLUS else raw, 0.0)


@triton.jit
def load_tiles(at, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """COUNT consecutive floats for each lane, as tiles ``(lanes, WIDTH)``: 16 bytes a load if WIDTH is 4."""
    tiles = ()
    for q in tl.static_range(COUNT // WIDTH):
        tiles = tiles + (tl.load((at + q * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]),)
    return tiles


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=("bc", "bc_b"))
def pack_rows(
    rows, bc, bc_b, bc_image, bc_token, bc_state, l, l_pad,
    n: tl.constexpr, STATES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Write float32 rows ``(directions, b, l_pad, 2 STATES)`` = [B | C], zero in padded states and tokens."""
    image, direction = tl.program_id(1).to(tl.int64), tl.program_id(2)
    if direction == 1:
        bc = bc_b
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    column = tl.arange(0, 2 * STATES)[None, :]
    kind, state = column // STATES, column % STATES
    at = bc + image * bc_image + t * bc_token + (kind * n + state) * bc_state
    x = tl.load(at, mask=(t < l) & (state < n), other=0)
    row = (direction * tl.num_programs(1) + image) * l_pad + t
    tl.store(rows + row * (2 * STATES) + column, x.to(tl.float32), mask=t < l_pad)


@triton.jit
def _advance(h, A2, row, dt, x):
    """Return the states after a token, exp(delta A) h + delta u B, and <C, h>."""
    dtx = (dt * x)[:, None]
    dt = dt[:, None]
    new = ()
    total = 0.0
    for q in tl.static_range(len(h)):
        value = tl.exp2(dt * A2[q]) * h[q] + dtx * row[q]
        new = new + (value,)
        total += value * row[len(h) + q]
    return new, tl.sum(total, 1)


@triton.jit
def _load_inputs(u, delta, first, step, here, l, u_token, delta_token, T: tl.constexpr):
    xs, raws = (), ()
    for k in tl.static_range(T):
        t = first + step * k
        exists = here & (t >= 0) & (t < l)
        xs = xs + (tl.load(u + t * u_token, mask=exists, other=0),)
        raws = raws + (tl.load(delta + t * delta_token, mask=exists, other=0),)
    return xs, raws


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=OPERANDS)
def scan_forward(  # noqa: C901, PLR0913, PLR0915
    out, saved, shares, entry, rows, u, u_b, delta, delta_b, A, A_b, D, D_b, bias, bias_b, z, mix,
    u_image, u_token, delta_image, delta_token, z_image, z_token, saved_image, l, l_pad, segment, reverse, scale,
    d: tl.constexpr, n: tl.constexpr, STATES: tl.constexpr, PAIR: tl.constexpr, SOFTPLUS: tl.constexpr,
    KEEP: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """One segment of 32 channels. A pair of directions is two warps, which walk from the two ends at once.

    Until the pair meets, each direction leaves y = s + D u (and its share of the mix) at its tokens; from there on it
    adds what the other has left and finishes the token. Loads of u and delta are T tokens ahead, rows one token.

    Beside the operands it takes or writes: out ``(b, l, d)``; saved ``(b, saved_image)``, states ``(directions,
    borders, n, d)`` and, for a pair, y ``(l, d)``; shares, scratch ``(b, l, d)`` for a pair with a mix; entry, states
    ``(b, directions, segments, n, d)`` that enter the segments, read only if there are several; rows, of
    `pack_rows`.
    """
    DIRECTIONS: tl.constexpr = 2 if PAIR else 1
    PREFETCH: tl.constexpr = STATES <= 16  # registers
    WIDTH: tl.constexpr = 4 if STATES >= 4 else STATES
    image, part = tl.program_id(1).to(tl.int64), tl.program_id(2)
    lane = tl.arange(0, LANES * DIRECTIONS)
    side = lane // LANES
    back = side != reverse
    channel = tl.program_id(0) * LANES + lane % LANES
    here = channel < d
    if PAIR:
        u, delta = tl.where(back, u_b, u), tl.where(back, delta_b, delta)
        A, D, bias = tl.where(back, A_b, A), tl.where(back, D_b, D), tl.where(back, bias_b, bias)
    skip = tl.load(D + channel, mask=here, other=0).to(tl.float32)
    offset = tl.load(bias + channel, mask=here, other=0).to(tl.float32)
    weight = 0.0
    if mix is not None:
        weight = tl.load(mix + image * DIRECTIONS + side).to(tl.float32)
    low = part * segment
    high = tl.minimum(l_pad, low + segment)
    borders = tl.cdiv(l, KEEP) - 1
    kept = saved + image * saved_image + side * borders * (n * d) + channel
    A2, h = (), ()
    for q in tl.static_range(STATES // WIDTH):
        state = q * WIDTH + tl.arange(0, WIDTH)[None, :]
        known = here[:, None] & (state < n)
        A2 = A2 + (tl.load((A + channel * n)[:, None] + state, mask=known, other=0).to(tl.float32) * LOG2E,)
        at = ((image * DIRECTIONS + side) * tl.num_programs(2) + part) * (n * d) + channel
        h = h + (tl.load((entry + at)[:, None] + state * d, mask=known & (tl.num_programs(2) > 1), other=0),)
    first = tl.where(back, high - 1, low)
    step = tl.where(back, -1, 1)
    u += image * u_image + channel
    delta += image * delta_image + channel
    out += image * l * d + channel
    if z is not None:
        z += image * z_image + channel
    if PAIR:
        y = saved + image * saved_image + 2 * borders * (n * d) + channel
        if mix is not None:
            shares += image * l * d + channel
    row_at = rows + ((side * tl.num_programs(1) + image) * l_pad + first) * (2 * STATES)
    row_step = step * (2 * STATES)
    blocks = (high - low) // T
    half = blocks // 2

    xs, raws = _load_inputs(u, delta, first, step, here, l, u_token, delta_token, T)
    row = ()
    if PREFETCH:
        row = load_tiles(row_at, 2 * STATES, WIDTH)
    for phase in tl.static_range(DIRECTIONS):
        for block in range(phase * half, blocks if phase == DIRECTIONS - 1 else half):
            start = first + step * (block * T)
            gates, others, other_shares = (), (), ()
            if phase == DIRECTIONS - 1:
                for k in tl.static_range(T):
                    t = start + step * k
                    exists = here & (t < l)
                    if z is not None:
                        gates = gates + (tl.load(z + t * z_token, mask=exists, other=0),)
                    if PAIR:
                        others = others + (tl.load(y + t * d, mask=exists, other=0),)
                        if mix is not None:
                            other_shares = other_shares + (tl.load(shares + t * d, mask=exists, other=0),)
            soon_xs, soon_raws = _load_inputs(u, delta, start + step * T, step, here, l, u_token, delta_token, T)
            for k in tl.static_range(T):
                row_at += row_step
                if PREFETCH:
                    now = row
                    row = load_tiles(row_at, 2 * STATES, WIDTH)
                else:
                    now = load_tiles(row_at - row_step, 2 * STATES, WIDTH)
                t = start + step * k
                exists = here & (t < l)
                x = xs[k].to(tl.float32)
                dt = step_size(raws[k].to(tl.float32) + offset, t < l, SOFTPLUS)
                h, s = _advance(h, A2, now, dt, x)
                total = s + skip * x
                if phase < DIRECTIONS - 1:
                    tl.store(y + t * d, total, mask=exists)
                    if mix is not None:
                        tl.store(shares + t * d, weight * s, mask=exists)
                else:
                    if PAIR:
                        total += others[k]
                        tl.store(y + t * d, total, mask=exists)
                    if z is not None:
                        gate = gates[k].to(tl.float32)
                        total *= gate * sigmoid(gate)
                    if mix is not None:
                        total += weight * s
                        if PAIR:
                            total += other_shares[k]
                    tl.store(out + t * d, scale * total, mask=exists)
            xs = soon_xs
            raws = soon_raws
            ahead_at, back_at = low + (block + 1) * T, high - (block + 1) * T
            if (ahead_at % KEEP == 0) | (back_at % KEEP == 0):
                stands_at = tl.where(back, back_at, ahead_at)
                crossed = here & (stands_at % KEEP == 0) & (stands_at > 0) & (stands_at < l)
                kept_at = kept + (stands_at // KEEP - 1) * (n * d)
                for q in tl.static_range(STATES // WIDTH):
                    state_kept = q * WIDTH + tl.arange(0, WIDTH)[None, :]
                    tl.store(kept_at[:, None] + state_kept * d, h[q], mask=crossed[:, None] & (state_kept < n))
        tl.debug_barrier()


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=(*OPERANDS, "x", "x_b"))
def segment_effect(  # noqa: C901, PLR0913, PLR0915
    effect, total, rows, x, x_b, delta, delta_b, A, A_b, bias, bias_b, z, mix,
    x_image, x_token, delta_image, delta_token, z_image, z_token, l, l_pad, segment, reverse, scale,
    d: tl.constexpr, n: tl.constexpr, STATES: tl.constexpr, PAIR: tl.constexpr, SOFTPLUS: tl.constexpr,
    ADJOINT: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """State that a segment leaves behind when none enters it, and its sum of delta.

    x is u, which goes in by B; for the adjoint, which walks against the scan, the output's gradient, which goes in by
    C.
    """
    DIRECTIONS: tl.constexpr = 2 if PAIR else 1
    WIDTH: tl.constexpr = 4 if STATES >= 4 else STATES
    image = tl.program_id(1).to(tl.int64)
    direction, part = tl.program_id(2) % DIRECTIONS, tl.program_id(2) // DIRECTIONS
    if direction == 1:
        x, delta, A, bias = x_b, delta_b, A_b, bias_b
    down = (direction != reverse) != ADJOINT
    channel = tl.program_id(0) * LANES + tl.arange(0, LANES)
    here = channel < d
    offset = tl.load(bias + channel, mask=here, other=0).to(tl.float32)
    weight = 0.0
    if ADJOINT and (mix is not None):
        weight = tl.load(mix + image * DIRECTIONS + direction).to(tl.float32)
    A2, h = (), ()
    for q in tl.static_range(STATES // WIDTH):
        state = q * WIDTH + tl.arange(0, WIDTH)[None, :]
        known = here[:, None] & (state < n)
        A2 = A2 + (tl.load((A + channel * n)[:, None] + state, mask=known, other=0).to(tl.float32) * LOG2E,)
        h = h + (tl.zeros(known.shape, tl.float32),)
    low = part * segment
    high = tl.minimum(l_pad, low + segment)
    first, step = tl.where(down, high - 1, low), tl.where(down, -1, 1)
    x += image * x_image + channel
    delta += image * delta_image + channel
    if z is not None:
        z += image * z_image + channel
    rows += (direction * tl.num_programs(1) + image) * l_pad * (2 * STATES) + (STATES if ADJOINT else 0)
    rows += tl.zeros_like(channel)
    sum_dt = tl.zeros_like(offset)
    for block in range((high - low) // T):
        start = first + step * (block * T)
        xs, raws = _load_inputs(x, delta, start, step, here, l, x_token, delta_token, T)
        gates = ()
        if ADJOINT and (z is not None):
            for k in tl.static_range(T):
                t = start + step * k
                gates = gates + (tl.load(z + t * z_token, mask=here & (t < l), other=0),)
        for k in tl.static_range(T):
            t = start + step * k
            row = load_tiles(rows + t * (2 * STATES), STATES, WIDTH)
            dt = step_size(raws[k].to(tl.float32) + offset, t < l, SOFTPLUS)
            into = xs[k].to(tl.float32)
            if ADJOINT:
                readout = 1.0
                if z is not None:
                    gate = gates[k].to(tl.float32)
                    readout = gate * sigmoid(gate)
                if mix is not None:
                    readout += weight
                into *= scale * readout
            else:
                into *= dt
            new = ()
            for q in tl.static_range(STATES // WIDTH):
                decay = tl.exp2(dt[:, None] * A2[q])
                if ADJOINT:
                    new = new + (decay * (h[q] + into[:, None] * row[q]),)
                else:
                    new = new + (decay * h[q] + into[:, None] * row[q],)
            h = new
            sum_dt += dt
    place = (image * DIRECTIONS + direction) * (tl.num_programs(2) // DIRECTIONS) + part
    for q in tl.static_range(STATES // WIDTH):
        left = q * WIDTH + tl.arange(0, WIDTH)[None, :]
        tl.store((effect + place * n * d + channel)[:, None] + left * d, h[q], mask=here[:, None] & (left < n))
    tl.store(total + place * d + channel, sum_dt, mask=here)


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=OPERANDS)
def chain_segments(
    entry, effect, total, A, A_b, parts, reverse,
    d: tl.constexpr, n: tl.constexpr, PAIR: tl.constexpr, ADJOINT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """State that enters each segment. A program chains one state of BLOCK_D channels."""
    DIRECTIONS: tl.constexpr = 2 if PAIR else 1
    image = tl.program_id(1).to(tl.int64)
    direction, state = tl.program_id(2) % DIRECTIONS, tl.program_id(2) // DIRECTIONS
    if direction == 1:
        A = A_b
    down = (direction != reverse) != ADJOINT
    channel = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    here = channel < d
    A2 = tl.load(A + channel * n + state, mask=here, other=0).to(tl.float32) * LOG2E
    h = tl.zeros((BLOCK_D,), tl.float32)
    for i in tl.range(0, parts, num_stages=4):
        place = (image * DIRECTIONS + direction) * parts + tl.where(down, parts - 1 - i, i)
        at = (place * n + state) * d + channel
        sum_dt = tl.load(total + place * d + channel, mask=here, other=0)
        left = tl.load(effect + at, mask=here, other=0)
        tl.store(entry + at, h, mask=here)
        h = tl.exp2(sum_dt * A2) * h + left
