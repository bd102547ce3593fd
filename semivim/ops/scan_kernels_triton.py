"""Triton kernels of the selective scan; `scan_triton` launches them and says how they share the work.

Dimensions: b images, l tokens, d channels, n states. A program holds a tile ``(STATES, BLOCK_D)`` of one image's
states, STATES the power of two above n. ``x_image, x_token, x_channel`` are strides of x. A token's index counts from
the first token, ``walked`` counts in the direction of the scan.
"""
# mypy: ignore-errors
# Triton reads these functions, not Python: arguments are pointers or tiles, and an unrolled loop may change a type.

import triton
import triton.language as tl

_VARYING = ["l", "segment"]  # else every length that is a multiple of 16 compiles anew

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _softplus(x):
    # log1p(e) = 2 atanh(e / (2 + e)) as a series: the GPU's fast log loses the small step sizes.
    e = tl.exp(-tl.abs(x))
    s = e / (2 + e)
    q = s * s
    series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q / 15))))))
    return tl.maximum(x, 0) + 2 * s * series


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) without overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1 + e)


@triton.jit
def _within(index, size, condition):
    """``(index < size) & condition``; the interpreter makes int32 of a block and a scalar."""
    return index < tl.where(condition, size, 0)


@triton.jit
def _tile(x, channel, d, STATES: tl.constexpr):
    """Pointers ``(STATES, BLOCK_D)`` into ``(n, d)``.

    Channels are contiguous, so that a lane holds all states of one channel and sums over states stay inside it.
    """
    return x + tl.arange(0, STATES)[:, None] * d + channel[None, :]


@triton.jit
def _load_token(u, delta, z, t, u_token, delta_token, z_token, here):
    """What lies along the channels, in its own dtype; loaded a token ahead, as a line of DRAM is a long way."""
    return (
        tl.load(u + t * u_token, mask=here, other=0),
        tl.load(delta + t * delta_token, mask=here, other=0),
        tl.load(z + t * z_token, mask=here, other=0),
    )


@triton.jit
def _advance(h, dt, x, b_row, A2):
    return tl.exp2(dt[None, :] * A2) * h + (dt * x)[None, :] * b_row[:, None]


@triton.jit
def _forward_token(
    h, token, B, C, known, walked, l, A2, bias, skip, mix, boundary, state_size, both,
    SOFTPLUS: tl.constexpr, GATED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Advance by a token and store the state after a chunk; return it and the direction's share of the output."""
    b_row = tl.load(B, mask=known, other=0).to(tl.float32)
    c_row = tl.load(C, mask=known, other=0).to(tl.float32)
    x, dt = token[0].to(tl.float32), token[1].to(tl.float32) + bias
    if SOFTPLUS:
        dt = _softplus(dt)
    h = _advance(h, dt, x, b_row, A2)
    if ((walked + 1) % CHUNK == 0) | (walked + 1 == l):
        tl.store(boundary + walked // CHUNK * state_size, h, mask=both)
    s = tl.sum(h * c_row[:, None], 0)
    y = s + skip * x
    if GATED:
        gate = token[2].to(tl.float32)
        y = y * gate * sigmoid(gate)
    return h, y + mix * s


@triton.jit(do_not_specialize=_VARYING)
def selective_forward(
    out, states, entry, u, delta, A, B, C, D, z, bias,
    u_image, u_token, u_channel, delta_image, delta_token, delta_channel,
    row_image, row_token, row_state, z_image, z_token, z_channel, l, d, n, segment,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, GATED: tl.constexpr, SEGMENTED: tl.constexpr,
    STATES: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One segment of one direction."""
    image, part = tl.program_id(1).to(tl.int64), tl.program_id(2)
    channel, state = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, STATES)
    here = channel < d
    both = (state < n)[:, None] & here[None, :]
    A2 = tl.load(_tile(A, channel, d, STATES), mask=both, other=0).to(tl.float32) * LOG2E
    skip = tl.load(D + channel, mask=here, other=0).to(tl.float32)
    offset = tl.load(bias + channel, mask=here, other=0).to(tl.float32)
    u += image * u_image + channel * u_channel
    delta += image * delta_image + channel * delta_channel
    B += image * row_image + state * row_state
    C += image * row_image + state * row_state
    z += image * z_image + channel * z_channel
    out += image * l * d + channel
    boundary = _tile(states + image * tl.cdiv(l, CHUNK) * n * d, channel, d, STATES)
    low = part * segment
    length = tl.minimum(l, low + segment) - low
    h = tl.zeros((STATES, BLOCK_D), tl.float32)
    if SEGMENTED:
        h = tl.load(_tile(entry + (image * tl.num_programs(2) + part) * n * d, channel, d, STATES), mask=both, other=0)
    first, step = (low + length - 1, -1) if REVERSE else (low, 1)
    known = state < n
    token = _load_token(u, delta, z, first, u_token, delta_token, z_token, here)
    for i in range(length):
        t = first + step * i
        soon = _load_token(u, delta, z, t + step, u_token, delta_token, z_token, _within(channel, d, i + 1 < length))
        h, y = _forward_token(
            h, token, B + t * row_token, C + t * row_token, known, l - 1 - t if REVERSE else t, l,
            A2, offset, skip, 0.0, boundary, n * d, both, SOFTPLUS, GATED, CHUNK,
        )  # fmt: skip
        tl.store(out + t * d, y, mask=here)
        token = soon


@triton.jit(do_not_specialize=_VARYING)
def bidirectional_forward(
    out, states, entry, partial, u, u_b, delta, delta_b, A, A_b, B, C, B_b, C_b, D, D_b, z, bias, bias_b, psi, nu,
    u_image, u_token, u_channel, delta_image, delta_token, delta_channel,
    row_image, row_token, row_state, z_image, z_token, z_channel, l, d, n, segment,
    MIXED: tl.constexpr, SEGMENTED: tl.constexpr, STATES: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One segment of both directions, from its ends to its middle and on."""
    image, part = tl.program_id(1).to(tl.int64), tl.program_id(2)
    channel, state = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, STATES)
    here = channel < d
    both = (state < n)[:, None] & here[None, :]
    A2 = tl.load(_tile(A, channel, d, STATES), mask=both, other=0).to(tl.float32) * LOG2E
    A2_b = tl.load(_tile(A_b, channel, d, STATES), mask=both, other=0).to(tl.float32) * LOG2E
    skip = tl.load(D + channel, mask=here, other=0).to(tl.float32)
    skip_b = tl.load(D_b + channel, mask=here, other=0).to(tl.float32)
    offset = tl.load(bias + channel, mask=here, other=0).to(tl.float32)
    offset_b = tl.load(bias_b + channel, mask=here, other=0).to(tl.float32)
    mix, mix_b = _mix(psi, nu, image, 0, MIXED), _mix(psi, nu, image, 1, MIXED)
    at, delta_at = image * u_image + channel * u_channel, image * delta_image + channel * delta_channel
    row = image * row_image + state * row_state
    z += image * z_image + channel * z_channel
    out += image * l * d + channel
    partial += image * l * d + channel
    chunks = tl.cdiv(l, CHUNK)
    boundary = _tile(states + image * 2 * chunks * n * d, channel, d, STATES)
    low = part * segment
    high = tl.minimum(l, low + segment)
    length = high - low
    h = tl.zeros((STATES, BLOCK_D), tl.float32)
    h_b = tl.zeros((STATES, BLOCK_D), tl.float32)
    if SEGMENTED:
        segments = tl.num_programs(2)
        entering = _tile(entry + (image * 2 * segments + part) * n * d, channel, d, STATES)
        h = tl.load(entering, mask=both, other=0)
        h_b = tl.load(entering + segments * n * d, mask=both, other=0)
    u, delta, B, C = u + at, delta + delta_at, B + row, C + row
    u_b, delta_b, B_b, C_b = u_b + at, delta_b + delta_at, B_b + row, C_b + row
    known = state < n
    token = _load_token(u, delta, z, low, u_token, delta_token, z_token, here)
    token_b = _load_token(u_b, delta_b, z, high - 1, u_token, delta_token, z_token, here)
    for half in tl.static_range(2):
        for i in range(half * (length // 2), length // 2 if half == 0 else length):
            t = low + i
            r = high - 1 - i
            exists = _within(channel, d, i + 1 < length)
            soon = _load_token(u, delta, z, t + 1, u_token, delta_token, z_token, exists)
            soon_b = _load_token(u_b, delta_b, z, r - 1, u_token, delta_token, z_token, exists)
            h, own = _forward_token(
                h, token, B + t * row_token, C + t * row_token, known, t, l,
                A2, offset, skip, mix, boundary, n * d, both, True, True, CHUNK,
            )  # fmt: skip
            h_b, own_b = _forward_token(
                h_b, token_b, B_b + r * row_token, C_b + r * row_token, known, l - 1 - r, l,
                A2_b, offset_b, skip_b, mix_b, boundary + chunks * n * d, n * d, both, True, True, CHUNK,
            )  # fmt: skip
            if half == 0:
                tl.store(partial + t * d, own, mask=here)
                tl.store(partial + r * d, own_b, mask=here)
            else:  # at the middle token of an odd number stand both directions
                other = tl.where(t == r, own_b, tl.load(partial + t * d, mask=here))
                other_b = tl.where(t == r, own, tl.load(partial + r * d, mask=here))
                tl.store(out + t * d, 0.5 * (own + other), mask=here)
                tl.store(out + r * d, 0.5 * (own_b + other_b), mask=here)
            token = soon
            token_b = soon_b
        tl.debug_barrier()


@triton.jit
def _mix(psi, nu, image, direction, MIXED: tl.constexpr):
    """Weight of a direction's read-out in nu (psi s + (1 - psi) s_b), Semi-ViM Eq. (15), (16)."""
    weight = 0.0
    if MIXED:
        share = tl.load(psi + image).to(tl.float32)
        weight = tl.load(nu + image).to(tl.float32) * tl.where(direction == 1, 1 - share, share)
    return weight


@triton.jit
def _readout_gradient(grad, z, mix, scale, exists, GATED: tl.constexpr):
    """Gradients of y = <C, h> + D u and of <C, h>, which the hidden-state mix reads besides."""
    g = scale * tl.load(grad, mask=exists, other=0).to(tl.float32)
    dy = g
    if GATED:
        gate = tl.load(z, mask=exists, other=0).to(tl.float32)
        dy = g * gate * sigmoid(gate)
    return dy, dy + mix * g


@triton.jit(do_not_specialize=_VARYING)
def segment_effect(
    effect, total, x, x_b, delta, delta_b, A, A_b, row, row_b, z, bias, bias_b, psi, nu,
    x_image, x_token, x_channel, delta_image, delta_token, delta_channel,
    row_image, row_token, row_state, z_image, z_token, z_channel, l, d, n, segment, segments, scale,
    ADJOINT: tl.constexpr, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, GATED: tl.constexpr, MIXED: tl.constexpr,
    STATES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """State a segment leaves behind when none enters, and its sum of delta.

    x is u with B's rows, or for the adjoint the output's gradient with C's; the adjoint walks against the scan, and
    its segments are counted in the direction of the scan as its chunks are.
    """
    image, slot = tl.program_id(1).to(tl.int64), tl.program_id(2) // segments
    part, direction = tl.program_id(2) % segments, slot + REVERSE
    if direction == 1:
        x, delta, A, row, bias = x_b, delta_b, A_b, row_b, bias_b
    channel, state = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, STATES)
    here, known = channel < d, state < n
    both = known[:, None] & here[None, :]
    A2 = tl.load(_tile(A, channel, d, STATES), mask=both, other=0).to(tl.float32) * LOG2E
    offset = tl.load(bias + channel, mask=here, other=0).to(tl.float32)
    mix = _mix(psi, nu, image, direction, MIXED)
    x += image * x_image + channel * x_channel
    delta += image * delta_image + channel * delta_channel
    row += image * row_image + state * row_state
    z += image * z_image + channel * z_channel
    low = part * segment
    length = tl.minimum(l, low + segment) - low
    if ADJOINT:
        first = tl.where(direction == 1, l - low - length, low + length - 1)
        step = tl.where(direction == 1, 1, -1)
    else:
        first = tl.where(direction == 1, low + length - 1, low)
        step = tl.where(direction == 1, -1, 1)
    h = tl.zeros((STATES, BLOCK_D), tl.float32)
    sum_dt = tl.zeros((BLOCK_D,), tl.float32)
    for i in tl.range(0, length, num_stages=3):
        t = first + step * i
        dt = tl.load(delta + t * delta_token, mask=here, other=0).to(tl.float32) + offset
        if SOFTPLUS:
            dt = _softplus(dt)
        weights = tl.load(row + t * row_token, mask=known, other=0).to(tl.float32)
        decay = tl.exp2(dt[None, :] * A2)
        if ADJOINT:
            _, ds = _readout_gradient(x + t * x_token, z + t * z_token, mix, scale, here, GATED)
            h = decay * (h + ds[None, :] * weights[:, None])
        else:
            into = dt * tl.load(x + t * x_token, mask=here, other=0).to(tl.float32)
            h = decay * h + into[None, :] * weights[:, None]
        sum_dt += dt
    place = (image * tl.num_programs(2) + slot * segments + part) * d
    tl.store(_tile(effect + place * n, channel, d, STATES), h, mask=both)
    tl.store(total + place + channel, sum_dt, mask=here)


@triton.jit
def chain_segments(
    effect, total, A, A_b, d, n, segments,
    ADJOINT: tl.constexpr, REVERSE: tl.constexpr, STATES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Replace each segment's effect by the state that enters it."""
    image, slot = tl.program_id(1).to(tl.int64), tl.program_id(2)
    direction = slot + REVERSE
    if direction == 1:
        A = A_b
    channel, state = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, STATES)
    both = (state < n)[:, None] & (channel < d)[None, :]
    A2 = tl.load(_tile(A, channel, d, STATES), mask=both, other=0).to(tl.float32) * LOG2E
    place = (image * tl.num_programs(2) + slot) * segments
    h = tl.zeros((STATES, BLOCK_D), tl.float32)
    for i in range(segments):
        part = tl.where((direction == 1) | ADJOINT, segments - 1 - i, i)
        kept = _tile(effect + (place + part) * n * d, channel, d, STATES)
        sum_dt = tl.load(total + (place + part) * d + channel, mask=channel < d, other=0)
        left = tl.load(kept, mask=both, other=0)
        tl.store(kept, h, mask=both)
        h = tl.exp2(sum_dt[None, :] * A2) * h + left


@triton.jit
def _replay(h, u, delta, B, first, step, count, u_token, delta_token, row_token, A2, bias, channel, d, state, n,
            SOFTPLUS: tl.constexpr, SUB: tl.constexpr):  # fmt: skip
    """Walk SUB tokens, those from `count` on without effect.

    Returns:
        The states before each token and after the last, u, delta before softplus and delta of each token.
    """
    xs, raws, dts, b_rows, hs = (), (), (), (), (h,)
    for k in tl.static_range(SUB):
        t = first + step * k
        here, known = _within(channel, d, k < count), _within(state, n, k < count)
        x = tl.load(u + t * u_token, mask=here, other=0).to(tl.float32)
        raw = tl.load(delta + t * delta_token, mask=here, other=0).to(tl.float32) + bias
        dt = _softplus(raw) if SOFTPLUS else raw
        xs, raws, dts = xs + (x,), raws + (raw,), dts + (tl.where(here, dt, 0.0),)
        b_rows = b_rows + (tl.load(B + t * row_token, mask=known, other=0).to(tl.float32),)
    for k in tl.static_range(SUB):
        hs = hs + (_advance(hs[k], dts[k], xs[k], b_rows[k], A2),)
    return hs, xs, raws, dts


@triton.jit(do_not_specialize=_VARYING)
def scan_backward(  # noqa: PLR0915  one kernel, one walk: a part of it cannot be launched alone
    du, du_b, ddelta, ddelta_b, drow, dA, dD, dbias, y, kept, grad, states, entry,
    u, u_b, delta, delta_b, A, A_b, B, C, B_b, C_b, D, D_b, z, bias, bias_b, psi, nu,
    u_image, u_token, u_channel, delta_image, delta_token, delta_channel,
    row_image, row_token, row_state, z_image, z_token, z_channel, l, d, n, segment, segments, scale,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, GATED: tl.constexpr, MIXED: tl.constexpr, SEGMENTED: tl.constexpr,
    STATES: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """One segment of one direction, against the direction of the scan.

    Semi-ViM Eq. (3) transposed: g_t = ds_t C_t + exp(delta_{t+1} A) g_{t+1} is the gradient of h_t.
    """
    block, blocks, image = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    images, slot, part = tl.num_programs(1), tl.program_id(2) // segments, tl.program_id(2) % segments
    direction = slot + REVERSE
    if direction == 1:
        u, delta, A, B, C, D, bias, du, ddelta = u_b, delta_b, A_b, B_b, C_b, D_b, bias_b, du_b, ddelta_b
    channel, state = block * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, STATES)
    here = channel < d
    both = (state < n)[:, None] & here[None, :]
    A2 = tl.load(_tile(A, channel, d, STATES), mask=both, other=0).to(tl.float32) * LOG2E
    skip = tl.load(D + channel, mask=here, other=0).to(tl.float32)
    offset = tl.load(bias + channel, mask=here, other=0).to(tl.float32)
    mix = _mix(psi, nu, image, direction, MIXED)
    u += image * u_image + channel * u_channel
    delta += image * delta_image + channel * delta_channel
    B, C = B + image * row_image + state * row_state, C + image * row_image + state * row_state
    z += image * z_image + channel * z_channel
    at = image * l * d + channel
    grad, du, ddelta, y = grad + at, du + at, ddelta + at, y + slot.to(tl.int64) * images * l * d + at
    drow += ((slot * images + image) * blocks + block) * l * 2 * n + state
    cell = image * tl.num_programs(2) + tl.program_id(2)
    kept = _tile(
        kept + (cell * blocks + block) * (CHUNK // SUB) * STATES * BLOCK_D, tl.arange(0, BLOCK_D), BLOCK_D, STATES
    )
    boundary = (image * (tl.num_programs(2) // segments) + slot) * tl.cdiv(l, CHUNK) - 1
    boundary = _tile(states + boundary * n * d, channel, d, STATES)
    first, step = tl.where(direction == 1, l - 1, 0), tl.where(direction == 1, -1, 1)

    g, sum_dA = tl.zeros((STATES, BLOCK_D), tl.float32), tl.zeros((STATES, BLOCK_D), tl.float32)
    sum_dD, sum_dbias = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    if SEGMENTED:
        g = tl.load(_tile(entry + cell * n * d, channel, d, STATES), mask=both, other=0)
    last_chunk = (tl.minimum(l, (part + 1) * segment) - 1) // CHUNK
    for back in range(last_chunk - part * segment // CHUNK + 1):
        chunk = last_chunk - back
        count = tl.minimum(CHUNK, l - chunk * CHUNK)
        entered = _within(state, n, chunk > 0)[:, None] & here[None, :]
        h = tl.load(boundary + chunk * n * d, mask=entered, other=0)
        for sub in range(tl.cdiv(count, SUB)):
            tl.store(kept + sub * STATES * BLOCK_D, h)
            i = chunk * CHUNK + sub * SUB
            hs, xs, raws, dts = _replay(
                h, u, delta, B, first + step * i, step, l - i, u_token, delta_token, row_token,
                A2, offset, channel, d, state, n, SOFTPLUS, SUB,
            )  # fmt: skip
            h = hs[SUB]
        tl.debug_barrier()
        for sub_back in range(tl.cdiv(count, SUB)):
            sub = tl.cdiv(count, SUB) - 1 - sub_back
            i = chunk * CHUNK + sub * SUB
            hs, xs, raws, dts = _replay(
                tl.load(kept + sub * STATES * BLOCK_D), u, delta, B, first + step * i, step, l - i,
                u_token, delta_token, row_token, A2, offset, channel, d, state, n, SOFTPLUS, SUB,
            )  # fmt: skip
            for k in tl.static_range(SUB - 1, -1, -1):
                t = first + step * (i + k)
                exists, known = _within(channel, d, i + k < l), _within(state, n, i + k < l)
                x, dt = xs[k], dts[k]
                b_row = tl.load(B + t * row_token, mask=known, other=0).to(tl.float32)
                c_row = tl.load(C + t * row_token, mask=known, other=0).to(tl.float32)
                dy, ds = _readout_gradient(grad + t * d, z + t * z_token, mix, scale, exists, GATED)
                if GATED:
                    tl.store(y + t * d, tl.sum(hs[k + 1] * c_row[:, None], 0) + skip * x, mask=exists)
                g += ds[None, :] * c_row[:, None]
                tl.store(drow + t * 2 * n, tl.sum(g * (dt * x)[None, :], 1), mask=known)
                tl.store(drow + t * 2 * n + n, tl.sum(hs[k + 1] * ds[None, :], 1), mask=known)
                into = tl.sum(g * b_row[:, None], 0)
                g *= tl.exp2(dt[None, :] * A2)
                into_decay = g * hs[k]
                sum_dA += into_decay * dt[None, :]
                draw = into * x + tl.sum(into_decay * A2, 0) * LN2
                if SOFTPLUS:
                    draw *= sigmoid(raws[k])
                sum_dD += dy * x
                sum_dbias += tl.where(exists, draw, 0.0)
                tl.store(du + t * d, into * dt + skip * dy, mask=exists)
                tl.store(ddelta + t * d, draw, mask=exists)
        tl.debug_barrier()
    place = (slot * images + image) * segments + part
    tl.store(_tile(dA + place * n * d, channel, d, STATES), sum_dA, mask=both)
    tl.store(dD + place * d + channel, sum_dD, mask=here)
    tl.store(dbias + place * d + channel, sum_dbias, mask=here)


@triton.jit
def gate_backward(dz, y, grad, z, z_image, z_token, z_channel, size, d, scale, BOTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write dz = grad SiLU'(z) y, with y the sum of the directions' parts."""
    image = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = at < size
    gate = tl.load(z + image * z_image + at // d * z_token + at % d * z_channel, mask=exists, other=0).to(tl.float32)
    total = tl.load(y + image * size + at, mask=exists, other=0)
    if BOTH:
        total += tl.load(y + (tl.num_programs(1) + image) * size + at, mask=exists, other=0)
    slope = sigmoid(gate)
    g = scale * tl.load(grad + image * size + at, mask=exists, other=0).to(tl.float32)
    tl.store(dz + image * size + at, g * total * slope * (1 + gate * (1 - slope)), mask=exists)
