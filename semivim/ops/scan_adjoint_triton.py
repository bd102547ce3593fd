"""Triton kernels of the selective scan's backward pass.

Dimensions as in `scan_kernels_triton`. A program is one warp, which walks one direction of some channels against the
scan. Its lanes lie in STATE_LANES rows of 32 / STATE_LANES: lane (g, c) holds the states of group g, STATES /
STATE_LANES of them, of the channels c, c + 32 / STATE_LANES, ... (REPEATS of them), one register each. What belongs to
a token and a channel (u, delta, the gate, the gradient) is spread over the rows of lanes: lane (g, c) holds it for
token g // REPEATS of a group of TOKENS = STATE_LANES / REPEATS tokens, and channel repeat g % REPEATS.

Values pass between lanes by `tl.gather` along an axis that is the whole warp: one shuffle, no shared memory. Sums over
lanes halve the number of values at every exchange, so that each lane ends with the sums it stores.

A chunk of KEEP tokens is walked twice: from the state at its border, to note the state before each CHUNK tokens in
scratch memory, then backwards CHUNK tokens at a time with their states in registers.
"""
# mypy: ignore-errors
# Triton reads its kernels, not Python: arguments are pointers or tiles.

import triton
import triton.language as tl

from .scan_kernels_triton import INTEGERS, LANES, LN2, LOG2E, OPERANDS, load_tiles, sigmoid, step_size


@triton.jit
def _exchange(x, lane, BIT: tl.constexpr):
    return tl.gather(x, lane ^ BIT, 0)


@triton.jit
def _halve(values, lane, BIT: tl.constexpr):
    """Lanes without BIT get the pair's sums of the first half of the values, lanes with it of the second."""
    upper = (lane & BIT) != 0
    half: tl.constexpr = len(values) // 2
    new = ()
    for i in tl.static_range(half):
        kept = tl.where(upper, values[half + i], values[i])
        given = tl.where(upper, values[i], values[half + i])
        new = new + (kept + _exchange(given, lane, BIT),)
    return new


@triton.jit
def _sum_over_lanes(values, lane, UNIT: tl.constexpr, COUNT: tl.constexpr):
    """Sum each of the values over COUNT lanes that stand UNIT apart; both are powers of two.

    Returns:
        For lane position p = lane // UNIT % COUNT: with at least COUNT values, the sums p * m .. p * m + m - 1 of
        them, m to a lane; with fewer, the one sum p * len(values) // COUNT.
    """
    for i in tl.static_range(5):
        if (COUNT >> (i + 1)) > 0:
            if len(values) > 1:
                values = _halve(values, lane, UNIT * (COUNT >> (i + 1)))
            else:
                values = (values[0] + _exchange(values[0], lane, UNIT * (COUNT >> (i + 1))),)
    return values


@triton.jit
def _pick(x, lane, GROUP: tl.constexpr, STATE_LANES: tl.constexpr):
    """Value of row GROUP of lanes, on all rows."""
    picked = x
    if STATE_LANES > 1:
        picked = tl.gather(x, lane % (LANES // STATE_LANES) + (LANES // STATE_LANES) * GROUP, 0)
    return picked


@triton.jit
def _load(x, first, step, token, channel, here, l, x_token, TOKENS: tl.constexpr, CHUNK: tl.constexpr):
    """Values of CHUNK tokens, TOKENS of them to a tile ``(32,)``; zeros where there is no token."""
    values = ()
    for m in tl.static_range(CHUNK // TOKENS):
        t = first + step * (m * TOKENS + token)
        values = values + (tl.load(x + (t * x_token + channel), mask=here & (t >= 0) & (t < l), other=0),)
    return values


@triton.jit
def _steps(xs, raws, first, step, token, l, offset, SOFTPLUS: tl.constexpr, TOKENS: tl.constexpr):
    """Return u, delta before softplus and delta in float32."""
    wide, biased, dts = (), (), ()
    for m in tl.static_range(len(xs)):
        t = first + step * (m * TOKENS + token)
        raw = raws[m].to(tl.float32) + offset
        wide = wide + (xs[m].to(tl.float32),)
        biased = biased + (raw,)
        dts = dts + (step_size(raw, t < l, SOFTPLUS),)
    return wide, biased, dts


@triton.jit
def _advance(
    h, A2, row_at, dts, xs, lane, k: tl.constexpr,
    EACH: tl.constexpr, WIDTH: tl.constexpr, STATE_LANES: tl.constexpr, REPEATS: tl.constexpr,
):  # fmt: skip
    """Return the states after token k of a chunk and exp(delta A); `row_at` points to the token's row."""
    TOKENS: tl.constexpr = STATE_LANES // REPEATS
    b_row = load_tiles(row_at, EACH, WIDTH)
    new, decays = (), ()
    for r in tl.static_range(REPEATS):
        dt = _pick(dts[k // TOKENS], lane, (k % TOKENS) * REPEATS + r, STATE_LANES)[:, None]
        dtx = _pick(dts[k // TOKENS] * xs[k // TOKENS], lane, (k % TOKENS) * REPEATS + r, STATE_LANES)[:, None]
        for q in tl.static_range(EACH // WIDTH):
            decay = tl.exp2(dt * A2[r * (EACH // WIDTH) + q])
            decays = decays + (decay,)
            new = new + (decay * h[r * (EACH // WIDTH) + q] + dtx * b_row[q],)
    return new, decays


@triton.jit
def _columns(tiles):
    """Columns of tiles ``(lanes, 1, 2 or 4)``, in order."""
    columns = ()
    for q in tl.static_range(len(tiles)):
        x = tiles[q]
        if x.shape[1] == 1:
            columns = columns + (tl.reshape(x, (x.shape[0],)),)
        elif x.shape[1] == 2:
            columns = columns + tl.split(x)
        else:
            even, odd = tl.split(tl.reshape(x, (x.shape[0], 2, 2)))
            x0, x2 = tl.split(even)
            x1, x3 = tl.split(odd)
            columns = columns + (x0, x1, x2, x3)
    return columns


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=OPERANDS)
def scan_backward(  # noqa: C901, PLR0913, PLR0915
    du, du_b, ddelta, ddelta_b, dz, drows, dweights, notes, grad, saved, entry, rows,
    u, u_b, delta, delta_b, A, A_b, D, D_b, bias, bias_b, z, mix,
    u_image, u_token, delta_image, delta_token, z_image, z_token, saved_image, l, l_pad, segment, reverse, scale,
    d: tl.constexpr, n: tl.constexpr, STATES: tl.constexpr, PAIR: tl.constexpr, SOFTPLUS: tl.constexpr,
    KEEP: tl.constexpr, CHUNK: tl.constexpr, STATE_LANES: tl.constexpr, REPEATS: tl.constexpr, GROUP: tl.constexpr,
    DZ_ROW: tl.constexpr,
):  # fmt: skip
    """One segment of one direction, against the direction of the scan.

    Semi-ViM Eq. (3) transposed: g_t = ds_t C_t + exp(delta_{t+1} A) g_{t+1} is the gradient of h_t.

    Beside operands and gradients it takes or writes: drows, gradients of the rows ``(directions, b, programs along d,
    l_pad, 2 STATES)``; dweights, gradients of A ``(d, n)``, D ``(d,)`` and bias ``(d,)`` in one row, ``(directions,
    b segments, .)``; notes, scratch for each program; saved, states ``(directions, borders, n, d)`` and, for a pair,
    y ``(l, d)``, which is computed for a single direction; entry, g ``(b, directions, segments, n, d)`` that enters the
    segments, read only if there are several. GROUP tokens' gradients of [B | C] are summed over the lanes together.
    Rows of dz lie DZ_ROW apart.
    """
    DIRECTIONS: tl.constexpr = 2 if PAIR else 1
    SPAN: tl.constexpr = LANES // STATE_LANES
    TOKENS: tl.constexpr = STATE_LANES // REPEATS
    EACH: tl.constexpr = STATES // STATE_LANES
    WIDTH: tl.constexpr = 4 if EACH >= 4 else EACH
    TILES: tl.constexpr = EACH // WIDTH  # of one channel
    HELD: tl.constexpr = REPEATS * TILES
    SUMS: tl.constexpr = 2 * EACH * GROUP
    GATED: tl.constexpr = z is not None
    READOUT: tl.constexpr = GATED and (not PAIR)
    block, blocks, image = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    direction, part = tl.program_id(2) % DIRECTIONS, tl.program_id(2) // DIRECTIONS
    parts = tl.num_programs(2) // DIRECTIONS
    if direction == 1:
        u, delta, A, D, bias, du, ddelta = u_b, delta_b, A_b, D_b, bias_b, du_b, ddelta_b
    down = direction != reverse
    lane = tl.arange(0, LANES)
    group, c = lane // SPAN, lane % SPAN
    base = block * (SPAN * REPEATS) + c
    channel = base + (group % REPEATS) * SPAN
    token = group // REPEATS
    here = channel < d
    state = group * EACH
    skip = tl.load(D + channel, mask=here, other=0).to(tl.float32)
    offset = tl.load(bias + channel, mask=here, other=0).to(tl.float32)
    weight = 0.0
    if mix is not None:
        weight = tl.load(mix + image * DIRECTIONS + direction).to(tl.float32)
    zero = tl.zeros((LANES,), tl.float32)
    A2, g, sum_dA = (), (), ()
    cell = (image * DIRECTIONS + direction) * parts + part
    wide = tl.arange(0, WIDTH)[None, :]
    known, A_at, state_at = (), (), ()  # state_at: of states (n, d), A_at: of states (d, n)
    for r in tl.static_range(REPEATS):
        for q in tl.static_range(TILES):
            of_state = (state + q * WIDTH)[:, None] + wide
            of_channel = (base + r * SPAN)[:, None]
            known = known + ((of_channel < d) & (of_state < n),)
            A_at = A_at + (of_channel * n + of_state,)
            state_at = state_at + (of_state * d + of_channel,)
    for i in tl.static_range(HELD):
        a = tl.load(A + A_at[i], mask=known[i], other=0).to(tl.float32)
        A2 = A2 + (a * LOG2E,)
        sum_dA = sum_dA + (tl.zeros((LANES, WIDTH), tl.float32),)
        g = g + (tl.load(entry + cell * (n * d) + state_at[i], mask=known[i] & (parts > 1), other=0),)
    sum_dD, sum_dbias = zero, zero
    # The channel stands in the offsets: in the pointers it would take two registers a tensor.
    u += image * u_image
    delta += image * delta_image
    at = image * l * d
    grad, du, ddelta = grad + at, du + at, ddelta + at
    if GATED:
        z += image * z_image
        dz += image * l * DZ_ROW
    borders = tl.cdiv(l, KEEP) - 1
    saved += image * saved_image
    y = saved + 2 * borders * (n * d)
    pair = direction * tl.num_programs(1) + image
    rows += pair * l_pad * (2 * STATES) + state
    position: tl.constexpr = SUMS // SPAN if SUMS >= SPAN else 1
    sums_at = c * SUMS // SPAN
    drows += (pair * blocks + block) * l_pad * (2 * STATES)
    notes += ((cell * blocks + block) * (KEEP // CHUNK)) * (REPEATS * EACH * LANES) + (lane * WIDTH)[:, None] + wide
    step = tl.where(down, -1, 1)
    low, high = part * segment, tl.minimum(l_pad, (part + 1) * segment)
    first_chunk, chunks = low // KEEP, tl.cdiv(high, KEEP) - low // KEEP
    for back in range(chunks):
        chunk = first_chunk + tl.where(down, back, chunks - 1 - back)
        border = chunk - tl.where(down, 0, 1)
        entered = (border >= 0) & (border < borders)
        h = ()
        kept = saved + (direction * borders + border) * (n * d)
        for i in tl.static_range(HELD):
            h = h + (tl.load(kept + state_at[i], mask=known[i] & entered, other=0),)
        end = tl.minimum(high, (chunk + 1) * KEEP)
        start = tl.where(down, end - 1, chunk * KEEP)
        count = (end - chunk * KEEP) // CHUNK
        raw_xs = _load(u, start, step, token, channel, here, l, u_token, TOKENS, CHUNK)
        raw_ds = _load(delta, start, step, token, channel, here, l, delta_token, TOKENS, CHUNK)
        for sub in range(count - 1):
            first = start + step * (sub * CHUNK)
            for i in tl.static_range(HELD):
                tl.store(notes + (sub * HELD + i) * (LANES * WIDTH), h[i])
            xs, raws, dts = _steps(raw_xs, raw_ds, first, step, token, l, offset, SOFTPLUS, TOKENS)
            raw_xs = _load(u, first + step * CHUNK, step, token, channel, here, l, u_token, TOKENS, CHUNK)
            raw_ds = _load(delta, first + step * CHUNK, step, token, channel, here, l, delta_token, TOKENS, CHUNK)
            for k in tl.static_range(CHUNK):
                row_at = rows + (first + step * k) * (2 * STATES)
                h, _ = _advance(h, A2, row_at, dts, xs, lane, k, EACH, WIDTH, STATE_LANES, REPEATS)
        for i in tl.static_range(HELD):
            tl.store(notes + ((count - 1) * HELD + i) * (LANES * WIDTH), h[i])
        tl.debug_barrier()
        for sub_back in range(count):
            sub = count - 1 - sub_back
            first = start + step * (sub * CHUNK)
            here_xs = _load(u, first, step, token, channel, here, l, u_token, TOKENS, CHUNK)
            here_ds = _load(delta, first, step, token, channel, here, l, delta_token, TOKENS, CHUNK)
            grads = _load(grad, first, step, token, channel, here, l, d, TOKENS, CHUNK)
            gates = ()
            if GATED:
                gates = _load(z, first, step, token, channel, here, l, z_token, TOKENS, CHUNK)
            hs = ()
            for i in tl.static_range(HELD):
                hs = hs + (tl.load(notes + (sub * HELD + i) * (LANES * WIDTH)),)
            xs, raws, dts = _steps(here_xs, here_ds, first, step, token, l, offset, SOFTPLUS, TOKENS)
            dys, dss = (), ()
            for m in tl.static_range(CHUNK // TOKENS):
                t = first + step * (m * TOKENS + token)
                own = scale * grads[m].to(tl.float32)
                dy = own
                if GATED:
                    gate = gates[m].to(tl.float32)
                    slope = sigmoid(gate)
                    dy = own * gate * slope
                    if PAIR:  # noqa: SIM102  known to the compiler, the direction is not
                        if direction == 0:
                            exists = here & (t < l)
                            dgate = own * slope * (1 + gate * (1 - slope))
                            dgate *= tl.load(y + (t * d + channel), mask=exists, other=0)
                            tl.store(dz + (t * DZ_ROW + channel), dgate, mask=exists)
                dys = dys + (dy,)
                if mix is not None:
                    dy += weight * own
                dss = dss + (dy,)
            decays = ()
            for k in tl.static_range(CHUNK):
                row_at = rows + (first + step * k) * (2 * STATES)
                after, decay = _advance(hs[k * HELD :], A2, row_at, dts, xs, lane, k, EACH, WIDTH, STATE_LANES, REPEATS)
                hs, decays = hs + after, decays + decay
            b_row = load_tiles(rows + (first + step * (CHUNK - 1)) * (2 * STATES), EACH, WIDTH)
            c_row = load_tiles(rows + (first + step * (CHUNK - 1)) * (2 * STATES) + STATES, EACH, WIDTH)
            drow = ()
            for m in tl.static_range(CHUNK // TOKENS - 1, -1, -1):
                x, dt_all, dy = xs[m], dts[m], dys[m]
                dtx_all = dt_all * x
                intos, into_decays, readouts = (), (), ()
                for k in tl.static_range(m * TOKENS + TOKENS - 1, m * TOKENS - 1, -1):
                    t = first + step * k
                    # The row of the token before; the scratch has spare rows at both ends.
                    b_soon = load_tiles(rows + (t - step) * (2 * STATES), EACH, WIDTH)
                    c_soon = load_tiles(rows + (t - step) * (2 * STATES) + STATES, EACH, WIDTH)
                    dB, dC, new_g, new_dA = (), (), (), ()
                    into_k, decay_k, readout_k = (), (), ()
                    for r in tl.static_range(REPEATS):
                        dt = _pick(dt_all, lane, (k % TOKENS) * REPEATS + r, STATE_LANES)[:, None]
                        dtx = _pick(dtx_all, lane, (k % TOKENS) * REPEATS + r, STATE_LANES)[:, None]
                        ds = _pick(dss[m], lane, (k % TOKENS) * REPEATS + r, STATE_LANES)[:, None]
                        into, into_decay, readout = 0.0, 0.0, 0.0
                        for q in tl.static_range(TILES):
                            own = g[r * TILES + q] + ds * c_row[q]
                            state_after = hs[(k + 1) * HELD + r * TILES + q]
                            if r == 0:
                                dB = dB + (own * dtx,)
                                dC = dC + (state_after * ds,)
                            else:
                                dB = dB[1:] + (dB[0] + own * dtx,)
                                dC = dC[1:] + (dC[0] + state_after * ds,)
                            into += own * b_row[q]
                            if READOUT:
                                readout += state_after * c_row[q]
                            own *= decays[k * HELD + r * TILES + q]
                            decayed = own * hs[k * HELD + r * TILES + q]
                            new_dA = new_dA + (sum_dA[r * TILES + q] + decayed * dt,)
                            into_decay += decayed * A2[r * TILES + q]
                            new_g = new_g + (own,)
                        into_k, decay_k = into_k + (tl.sum(into, 1),), decay_k + (tl.sum(into_decay, 1),)
                        if READOUT:
                            readout_k = readout_k + (tl.sum(readout, 1),)
                    g = new_g
                    sum_dA = new_dA
                    intos, into_decays, readouts = into_k + intos, decay_k + into_decays, readout_k + readouts
                    drow = _columns(dB + dC) + drow
                    if k % GROUP == 0:
                        shared = _sum_over_lanes(drow, lane, 1, SPAN)
                        for i in tl.static_range(position):
                            index = sums_at + i
                            place = t + step * (index // (2 * EACH))
                            kind, of = index // EACH % 2, index % EACH
                            drow_at = drows + place * (2 * STATES) + kind * STATES + state + of
                            if SUMS < SPAN:
                                tl.store(drow_at, shared[i], mask=c % (SPAN // SUMS) == 0)
                            else:
                                tl.store(drow_at, shared[i])
                        drow = ()
                    b_row = b_soon
                    c_row = c_soon
                into = _sum_over_lanes(intos, lane, SPAN, STATE_LANES)[0]
                draw = into * x + _sum_over_lanes(into_decays, lane, SPAN, STATE_LANES)[0] * LN2  # A2 = A log2(e)
                if SOFTPLUS:
                    draw *= sigmoid(raws[m])
                t = first + step * (m * TOKENS + token)
                exists = here & (t < l)
                if READOUT:
                    total = _sum_over_lanes(readouts, lane, SPAN, STATE_LANES)[0] + skip * x
                    gate = gates[m].to(tl.float32)
                    slope = sigmoid(gate)
                    own = scale * grads[m].to(tl.float32)
                    tl.store(dz + (t * DZ_ROW + channel), own * total * slope * (1 + gate * (1 - slope)), mask=exists)
                sum_dD += dy * x
                sum_dbias += tl.where(exists, draw, 0.0)
                tl.store(du + (t * d + channel), into * dt_all + skip * dy, mask=exists)
                tl.store(ddelta + (t * d + channel), draw, mask=exists)
        tl.debug_barrier()
    dweights += ((direction * tl.num_programs(1) + image) * parts + part) * (d * (n + 2))
    for i in tl.static_range(HELD):
        tl.store(dweights + A_at[i], sum_dA[i], mask=known[i])
    dD = _sum_over_lanes((sum_dD,), lane, SPAN * REPEATS, TOKENS)[0]
    dbias = _sum_over_lanes((sum_dbias,), lane, SPAN * REPEATS, TOKENS)[0]
    tl.store(dweights + d * n + channel, dD, mask=here & (token == 0))
    tl.store(dweights + d * (n + 1) + channel, dbias, mask=here & (token == 0))


@triton.jit
def _sum_rows(
    dbc, dbc_b, drows, program, images, blocks, l, l_pad,
    n: tl.constexpr, STATES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    of_image = tl.cdiv(l, TOKENS)
    direction, image = program // (images * of_image), (program // of_image % images).to(tl.int64)
    if direction == 1:
        dbc = dbc_b
    t = program % of_image * TOKENS + tl.arange(0, TOKENS)[:, None]
    column = tl.arange(0, 2 * STATES)[None, :]
    at = drows + ((direction * images + image) * blocks * l_pad + t) * (2 * STATES) + column
    total = tl.zeros((TOKENS, 2 * STATES), tl.float32)
    for _ in tl.range(0, blocks, num_stages=1, loop_unroll_factor=4):
        total += tl.load(at, mask=t < l, other=0)
        at += l_pad * (2 * STATES)
    kind, state = column // STATES, column % STATES
    tl.store(dbc + (image * l + t) * (2 * n) + kind * n + state, total, mask=(t < l) & (state < n))


@triton.jit
def _sum_weights(  # noqa: PLR0913
    dA, dA_b, dD, dD_b, dbias, dbias_b, dweights, program, shares, d,
    n: tl.constexpr, PAIR: tl.constexpr, COLUMNS: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    DIRECTIONS: tl.constexpr = 2 if PAIR else 1
    weights = d * (n + 2)
    direction = program % DIRECTIONS
    if direction == 1:
        dA, dD, dbias = dA_b, dD_b, dbias_b
    column = program // DIRECTIONS * COLUMNS + tl.arange(0, COLUMNS)
    share = tl.arange(0, SHARES)[:, None]
    at = dweights + (direction.to(tl.int64) * shares + share) * weights + column[None, :]
    total = tl.zeros((SHARES, COLUMNS), tl.float32)
    for first in range(0, shares, SHARES):
        total += tl.load(at, mask=(first + share < shares) & (column < weights)[None, :], other=0)
        at += SHARES * weights
    sums = tl.sum(total, 0)
    tl.store(dA + column, sums, mask=column < d * n)
    tl.store(dD + (column - d * n), sums, mask=(column >= d * n) & (column < d * (n + 1)))
    tl.store(dbias + (column - d * (n + 1)), sums, mask=(column >= d * (n + 1)) & (column < weights))


@triton.jit(do_not_specialize=INTEGERS)
def sum_partials(  # noqa: PLR0913
    dbc, dbc_b, dA, dA_b, dD, dD_b, dbias, dbias_b, drows, dweights, images, blocks, parts, l, l_pad, d,
    n: tl.constexpr, STATES: tl.constexpr, PAIR: tl.constexpr, TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """Sum what the programs of `scan_backward` wrote, in a fixed order.

    The first programs own TOKENS rows of an image and direction, the others COLUMNS gradients of a direction's weights.
    """
    program = tl.program_id(0)
    of_rows = (2 if PAIR else 1) * images * tl.cdiv(l, TOKENS)
    if program < of_rows:
        _sum_rows(dbc, dbc_b, drows, program, images, blocks, l, l_pad, n, STATES, TOKENS)
    else:
        _sum_weights(
            dA, dA_b, dD, dD_b, dbias, dbias_b, dweights, program - of_rows, images * parts, d, n, PAIR, COLUMNS, SHARES
        )
