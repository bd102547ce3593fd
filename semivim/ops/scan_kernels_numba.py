# mypy: ignore-errors
"""The selective scan on a CPU: forward and backward kernels, sixteen channels in the lanes of a vector.

A task is one image and one block of channels, all directions. It walks the tokens in chunks; a chunk's step sizes and
gates are computed once, then four states at a time run over its tokens in registers. Rows are read where they lie:
addresses and strides come in records, so no tensor is copied, and a reversed direction is a negative stride.
The backward walks the chunks from the last: it recomputes the states and decays of a chunk from the stored state before
it, then runs the adjoint, so that forward and backward take two exponentials per state. Gradients of B and C are sums
over channels: over a block's vectors, over lanes once per chunk, over blocks at the end, always in the same order.
"""

import numpy as np

from .scan_reference import CHUNK
from .vector_numba import (
    FLOAT32,
    LANES,
    SOURCE,
    WIDTH,
    accumulate,
    compiled,
    exp2,
    load,
    load_float,
    load_lanes,
    record,
    sigmoid,
    softplus,
    splat,
    splat_at,
    store,
    store_lanes,
    store_sums,
)

GROUPS = 4  # vectors of channels in a task
BLOCK = GROUPS * LANES
QUAD = 4  # states that run over a chunk together
LN_2 = 0.6931471805599453

# One direction: operands with strides in bytes, 0 for an absent one, and gradients. A is transposed to (n, d), padded
# with zeros to whole quads and vectors, and holds log2(e) A.
DIRECTION = record(
    *(f"{tensor}{part}" for tensor in ("u", "delta", "B", "C") for part in ("", "_image", "_token")),
    *("A", "D", "bias", "leak", "reverse", "du", "ddelta", "dB", "dC", "dBC_token"),
)
# What both share. dBC, dA, dD, dbias: float32 partial sums per image, dBC also per block.
CALL = record(
    *("tokens", "channels", "lanes", "blocks", "n", "quads", "directions", "softplus", "size", "states"),
    *("z", "z_image", "z_token", "out", "grad", "grad_image", "grad_token", "dz"),
    *("dBC", "dA", "dD", "dbias", SOURCE),
    scale=np.float64,
)
# Where a thread is, and its scratch.
PLACE = record(
    *("image", "block", "direction", "chunk", "first", "step", "count", "c", "lanes", "group"),
    *("h", "bc", "dt", "du", "y", "total", "mix", "dy", "gated", "slope", "ddt", "into", "decays", "states", "dbc"),
)


def forward_scratch(tokens: int, quads: int, directions: int) -> dict[str, int]:
    """Bytes of a thread's scratch in the forward, by field of PLACE."""
    kept = BLOCK * 4 * tokens * (directions - 1)
    return {
        "h": GROUPS * quads * QUAD * WIDTH,
        "bc": CHUNK * 2 * QUAD * quads * 4 + WIDTH,
        **dict.fromkeys(("dt", "du", "y"), CHUNK * WIDTH),
        **dict.fromkeys(("total", "mix"), kept),
    }


def backward_scratch(tokens: int, quads: int, directions: int) -> dict[str, int]:
    """Bytes of a thread's scratch in the backward, by field of PLACE."""
    return {
        "h": GROUPS * quads * QUAD * WIDTH,
        "bc": CHUNK * 2 * QUAD * quads * 4 + WIDTH,
        **dict.fromkeys(("dt", "du", "y", "dy", "gated", "slope", "ddt", "into"), GROUPS * CHUNK * WIDTH),
        "total": BLOCK * 4 * tokens * (directions - 1),
        "decays": CHUNK * QUAD * WIDTH,
        "states": (CHUNK + 1) * QUAD * WIDTH,
        "dbc": CHUNK * 2 * QUAD * WIDTH,
    }


@compiled
def _enter_task(call, place, task):
    place.image = task // call.blocks
    place.block = task % call.blocks


@compiled
def _enter_chunk(call, side, place, chunk):
    place.chunk = chunk
    place.count = min(CHUNK, call.tokens - chunk * CHUNK)
    place.first, place.step = chunk * CHUNK, 1
    if side.reverse:
        place.first, place.step = call.tokens - 1 - chunk * CHUNK, -1


@compiled
def _enter_group(call, place, group):
    place.group = group
    place.c = place.block * BLOCK + group * LANES
    place.lanes = min(LANES, call.channels - place.c)


@compiled
def _num_groups(call, place):
    return min(GROUPS, (call.channels - place.block * BLOCK + LANES - 1) // LANES)


@compiled
def _load_weights(kind, call, side, place):
    """Copy a chunk's rows of B and C, zero-padded to whole quads, side by side to scratch as float32."""
    wide = QUAD * call.quads * 4
    at = place.bc
    b_row = side.B + place.image * side.B_image + place.first * side.B_token
    c_row = side.C + place.image * side.C_image + place.first * side.C_token
    for _ in range(place.count):
        # A vector may run over into what is written after it; the last one into room left for it.
        for j in range(0, call.n, LANES):
            store(at + 4 * j, load_lanes(kind, b_row + j * call.size, call.n - j))
        for j in range(0, call.n, LANES):
            store(at + wide + 4 * j, load_lanes(kind, c_row + j * call.size, call.n - j))
        at += 2 * wide
        b_row += place.step * side.B_token
        c_row += place.step * side.C_token


@compiled
def _weight(address, place):
    """A group's values of a float32 tensor over channels, zeros for an absent one."""
    if address == 0:
        return splat(0.0)
    return load_lanes(FLOAT32, address + 4 * place.c, place.lanes)


@compiled
def _leak(side, place):
    """Ungated share of the read-out in the output, Semi-ViM Eq. (16)."""
    if side.leak == 0:
        return splat(0.0)
    return splat(load_float(side.leak + 4 * place.image))


@compiled
def _run_quad(a_at, a_state, h, bc, wide, dt, du, y, count):
    """Run four states over a chunk; add their read-out to y."""
    a0, a1, a2, a3 = load(a_at), load(a_at + a_state), load(a_at + 2 * a_state), load(a_at + 3 * a_state)
    h0, h1, h2, h3 = load(h), load(h + WIDTH), load(h + 2 * WIDTH), load(h + 3 * WIDTH)
    for _ in range(count):
        step, into = load(dt), load(du)
        h0 = exp2(step * a0) * h0 + into * splat_at(bc)
        h1 = exp2(step * a1) * h1 + into * splat_at(bc + 4)
        h2 = exp2(step * a2) * h2 + into * splat_at(bc + 8)
        h3 = exp2(step * a3) * h3 + into * splat_at(bc + 12)
        c = bc + wide
        read = (h0 * splat_at(c) + h1 * splat_at(c + 4)) + (h2 * splat_at(c + 8) + h3 * splat_at(c + 12))
        store(y, load(y) + read)
        bc += 2 * wide
        dt += WIDTH
        du += WIDTH
        y += WIDTH
    store(h, h0)
    store(h + WIDTH, h1)
    store(h + 2 * WIDTH, h2)
    store(h + 3 * WIDTH, h3)


@compiled
def _store_states(call, place):
    """Keep the states after a chunk."""
    chunks = (call.tokens - 1) // CHUNK + 1
    row = (place.image * call.directions + place.direction) * chunks + place.chunk
    at = call.states + (row * call.n * call.channels + place.c) * 4
    h = place.h + place.group * call.quads * QUAD * WIDTH
    for s in range(call.n):
        store_lanes(FLOAT32, at + s * call.channels * 4, place.lanes, load(h + s * WIDTH))


@compiled
def _forward_group(kind, call, side, place):
    """Step sizes, states and gate of one vector of channels over one chunk."""
    dt, du, y, count, lanes, step = place.dt, place.du, place.y, place.count, place.lanes, place.step
    bias, skip = _weight(side.bias, place), _weight(side.D, place)
    u_row = side.u + place.image * side.u_image + place.first * side.u_token + place.c * call.size
    u_step = step * side.u_token
    row = side.delta + place.image * side.delta_image + place.first * side.delta_token + place.c * call.size
    row_step = step * side.delta_token
    for k in range(count):
        x = load_lanes(kind, row + k * row_step, lanes) + bias
        if call.softplus:
            x = softplus(x)
        store(dt + k * WIDTH, x)
        store(du + k * WIDTH, x * load_lanes(kind, u_row + k * u_step, lanes))
        store(y + k * WIDTH, splat(0.0))
    wide, a_state = QUAD * call.quads * 4, call.lanes * 4
    h = place.h + place.group * call.quads * QUAD * WIDTH
    for q in range(0, QUAD * call.quads, QUAD):
        a_at = side.A + q * a_state + 4 * place.c
        _run_quad(a_at, a_state, h + q * WIDTH, place.bc + 4 * q, wide, dt, du, y, count)
    _store_states(call, place)
    for k in range(count):
        s = load(y + k * WIDTH)
        skipped = skip * load_lanes(kind, u_row + k * u_step, lanes)
        _gate(kind, call, side, place, place.first + k * step, s + skipped, s)


@compiled
def _gate(kind, call, side, place, token, total, s):
    """Keep the first direction's sums; write the output with the last one's."""
    kept = (token * GROUPS + place.group) * WIDTH
    mix = _leak(side, place) * s
    if place.direction > 0:
        total = total + load(place.total + kept)
        if side.leak:
            mix = mix + load(place.mix + kept)
    if place.direction + 1 < call.directions:
        store(place.total + kept, total)
        if side.leak:
            store(place.mix + kept, mix)
        return
    if call.z:
        z_at = call.z + place.image * call.z_image + token * call.z_token + place.c * call.size
        z = load_lanes(kind, z_at, place.lanes)
        total = total * (z * sigmoid(z))
    at = call.out + ((place.image * call.tokens + token) * call.channels + place.c) * call.size
    store_lanes(kind, at, place.lanes, splat(call.scale) * (total + mix))


@compiled
def forward(kind, calls, sides, places, begin, end):
    """Run the tasks of a range."""
    call, place = calls[0], places[0]
    for task in range(begin, end):
        _enter_task(call, place, task)
        for direction in range(call.directions):
            side = sides[direction]
            place.direction = direction
            for at in range(place.h, place.h + GROUPS * call.quads * QUAD * WIDTH, WIDTH):
                store(at, splat(0.0))
            for chunk in range((call.tokens - 1) // CHUNK + 1):
                _enter_chunk(call, side, place, chunk)
                _load_weights(kind, call, side, place)
                for group in range(_num_groups(call, place)):
                    _enter_group(call, place, group)
                    _forward_group(kind, call, side, place)


@compiled
def _recompute_quad(a_at, a_state, decays, states, bc, wide, dt, du, y, count):
    """Four decays and states of a chunk's tokens, from the states before it; add the read-out to y."""
    a0, a1, a2, a3 = load(a_at), load(a_at + a_state), load(a_at + 2 * a_state), load(a_at + 3 * a_state)
    h0, h1, h2, h3 = load(states), load(states + WIDTH), load(states + 2 * WIDTH), load(states + 3 * WIDTH)
    for _ in range(count):
        step, into = load(dt), load(du)
        e0, e1, e2, e3 = exp2(step * a0), exp2(step * a1), exp2(step * a2), exp2(step * a3)
        store(decays, e0)
        store(decays + WIDTH, e1)
        store(decays + 2 * WIDTH, e2)
        store(decays + 3 * WIDTH, e3)
        h0 = e0 * h0 + into * splat_at(bc)
        h1 = e1 * h1 + into * splat_at(bc + 4)
        h2 = e2 * h2 + into * splat_at(bc + 8)
        h3 = e3 * h3 + into * splat_at(bc + 12)
        states += 4 * WIDTH
        store(states, h0)
        store(states + WIDTH, h1)
        store(states + 2 * WIDTH, h2)
        store(states + 3 * WIDTH, h3)
        c = bc + wide
        read = (h0 * splat_at(c) + h1 * splat_at(c + 4)) + (h2 * splat_at(c + 8) + h3 * splat_at(c + 12))
        store(y, load(y) + read)
        bc += 2 * wide
        decays += 4 * WIDTH
        dt += WIDTH
        du += WIDTH
        y += WIDTH


@compiled
def _adjoint_quad(a_at, a_state, g, dA, decays, states, bc, wide, dt, du, dy, ddt, into, dbc, count):
    """Adjoint of four states over a chunk, from its last token; adds to dA, ddt, into = sum of g B, dbc."""
    a0, a1, a2, a3 = load(a_at), load(a_at + a_state), load(a_at + 2 * a_state), load(a_at + 3 * a_state)
    g0, g1, g2, g3 = load(g), load(g + WIDTH), load(g + 2 * WIDTH), load(g + 3 * WIDTH)
    d0, d1, d2, d3 = load(dA), load(dA + a_state), load(dA + 2 * a_state), load(dA + 3 * a_state)
    for k in range(count - 1, -1, -1):
        b, row = bc + 2 * wide * k, k * WIDTH
        step, x, up = load(dt + row), load(du + row), load(dy + row)
        g0 = g0 + up * splat_at(b + wide)
        g1 = g1 + up * splat_at(b + wide + 4)
        g2 = g2 + up * splat_at(b + wide + 8)
        g3 = g3 + up * splat_at(b + wide + 12)
        add = dbc + 8 * row
        accumulate(add, g0 * x)
        accumulate(add + WIDTH, g1 * x)
        accumulate(add + 2 * WIDTH, g2 * x)
        accumulate(add + 3 * WIDTH, g3 * x)
        h = states + 4 * row
        accumulate(add + 4 * WIDTH, up * load(h + 4 * WIDTH))
        accumulate(add + 5 * WIDTH, up * load(h + 5 * WIDTH))
        accumulate(add + 6 * WIDTH, up * load(h + 6 * WIDTH))
        accumulate(add + 7 * WIDTH, up * load(h + 7 * WIDTH))
        accumulate(
            into + row, (g0 * splat_at(b) + g1 * splat_at(b + 4)) + (g2 * splat_at(b + 8) + g3 * splat_at(b + 12))
        )
        e = decays + 4 * row
        g0 = g0 * load(e)
        g1 = g1 * load(e + WIDTH)
        g2 = g2 * load(e + 2 * WIDTH)
        g3 = g3 * load(e + 3 * WIDTH)
        w0, w1, w2, w3 = g0 * load(h), g1 * load(h + WIDTH), g2 * load(h + 2 * WIDTH), g3 * load(h + 3 * WIDTH)
        accumulate(ddt + row, (w0 * a0 + w1 * a1) + (w2 * a2 + w3 * a3))
        d0 = d0 + w0 * step
        d1 = d1 + w1 * step
        d2 = d2 + w2 * step
        d3 = d3 + w3 * step
    store(g, g0)
    store(g + WIDTH, g1)
    store(g + 2 * WIDTH, g2)
    store(g + 3 * WIDTH, g3)
    store(dA, d0)
    store(dA + a_state, d1)
    store(dA + 2 * a_state, d2)
    store(dA + 3 * a_state, d3)


@compiled
def _upstream(kind, call, place, token):
    """Scaled gradient of the output."""
    at = call.grad + place.image * call.grad_image + token * call.grad_token + place.c * call.size
    return splat(call.scale) * load_lanes(kind, at, place.lanes)


@compiled
def _load_gate(kind, call, place, token):
    at = call.z + place.image * call.z_image + token * call.z_token + place.c * call.size
    return load_lanes(kind, at, place.lanes)


@compiled
def _prepare_group(kind, call, side, place):
    """Step sizes and the gradient of the read-out of one vector of channels over one chunk; zeros to add to."""
    bias, leak, zero = _weight(side.bias, place), _leak(side, place), splat(0.0)
    u_row = side.u + place.image * side.u_image + place.c * call.size
    row = side.delta + place.image * side.delta_image + place.c * call.size
    for k in range(place.count):
        token, at = place.first + k * place.step, (place.group * CHUNK + k) * WIDTH
        x = load_lanes(kind, row + token * side.delta_token, place.lanes) + bias
        slope = splat(1.0)
        if call.softplus:
            slope = sigmoid(x)
            x = softplus(x)
        store(place.slope + at, slope)
        store(place.dt + at, x)
        store(place.du + at, x * load_lanes(kind, u_row + token * side.u_token, place.lanes))
        grad = _upstream(kind, call, place, token)
        gated = grad
        if call.z:
            z = _load_gate(kind, call, place, token)
            gated = grad * (z * sigmoid(z))
        store(place.gated + at, gated)
        store(place.dy + at, gated + grad * leak)
        store(place.y + at, zero)
        store(place.ddt + at, zero)
        store(place.into + at, zero)


@compiled
def _load_states(call, place, q):
    """Four states before the chunk, where the recomputation starts from."""
    chunks = (call.tokens - 1) // CHUNK + 1
    row = (place.image * call.directions + place.direction) * chunks + place.chunk - 1
    at = call.states + (row * call.n * call.channels + place.c) * 4
    for s in range(q, q + QUAD):
        if place.chunk == 0 or s >= call.n:
            store(place.states + (s - q) * WIDTH, splat(0.0))
        else:
            h = load_lanes(FLOAT32, at + s * call.channels * 4, place.lanes)
            store(place.states + (s - q) * WIDTH, h)


@compiled
def _backward_quad(call, side, place, q):
    """Recomputation and adjoint of four states of a block over one chunk; sums of dB and dC over its channels."""
    wide, a_state, count = QUAD * call.quads * 4, call.lanes * 4, place.count
    bc = place.bc + 4 * q
    for at in range(place.dbc, place.dbc + count * 8 * WIDTH, WIDTH):
        store(at, splat(0.0))
    for group in range(_num_groups(call, place)):
        _enter_group(call, place, group)
        _load_states(call, place, q)
        at = group * CHUNK * WIDTH
        dt, du, y, dy = place.dt + at, place.du + at, place.y + at, place.dy + at
        a_at = side.A + q * a_state + 4 * place.c
        _recompute_quad(a_at, a_state, place.decays, place.states, bc, wide, dt, du, y, count)
        g = place.h + (group * call.quads * QUAD + q) * WIDTH
        row = (place.image * call.directions + place.direction) * QUAD * call.quads + q
        dA = call.dA + row * a_state + 4 * place.c
        ddt, into = place.ddt + at, place.into + at
        _adjoint_quad(
            a_at, a_state, g, dA, place.decays, place.states, bc, wide, dt, du, dy, ddt, into, place.dbc, count
        )
    rows = ((place.image * call.blocks + place.block) * call.directions + place.direction) * call.tokens
    for k in range(count):
        out = call.dBC + (rows + place.first + k * place.step) * 2 * wide + 4 * q
        v = place.dbc + k * 8 * WIDTH
        store_sums(out, load(v), load(v + WIDTH), load(v + 2 * WIDTH), load(v + 3 * WIDTH))
        v += 4 * WIDTH
        store_sums(out + wide, load(v), load(v + WIDTH), load(v + 2 * WIDTH), load(v + 3 * WIDTH))


@compiled
def _finish_group(kind, call, side, place):
    """Gradients of u, delta, z, D and the bias of one vector of channels over one chunk."""
    skip = _weight(side.D, place)
    u_row = side.u + place.image * side.u_image + place.c * call.size
    sums = ((place.image * call.directions + place.direction) * call.lanes + place.c) * 4
    dD, dbias = load(call.dD + sums), load(call.dbias + sums)
    for k in range(place.count):
        token, at = place.first + k * place.step, (place.group * CHUNK + k) * WIDTH
        out = ((place.image * call.tokens + token) * call.channels + place.c) * call.size
        u = load_lanes(kind, u_row + token * side.u_token, place.lanes)
        gated, into = load(place.gated + at), load(place.into + at)
        store_lanes(kind, side.du + out, place.lanes, into * load(place.dt + at) + skip * gated)
        ddelta = (load(place.ddt + at) * splat(LN_2) + into * u) * load(place.slope + at)
        store_lanes(kind, side.ddelta + out, place.lanes, ddelta)
        dD = dD + gated * u
        dbias = dbias + ddelta
        if call.z:
            _differentiate_gate(kind, call, place, token, load(place.y + at) + skip * u, out)
    store(call.dD + sums, dD)
    store(call.dbias + sums, dbias)


@compiled
def _differentiate_gate(kind, call, place, token, total, out):
    """Keep the first direction's sums; write the gate's gradient with the last one's."""
    kept = place.total + (token * GROUPS + place.group) * WIDTH
    if place.direction > 0:
        total = total + load(kept)
    if place.direction + 1 < call.directions:
        store(kept, total)
        return
    z = _load_gate(kind, call, place, token)
    s = sigmoid(z)
    slope = s * (splat(1.0) + z * (splat(1.0) - s))
    store_lanes(kind, call.dz + out, place.lanes, _upstream(kind, call, place, token) * slope * total)


@compiled
def backward(kind, calls, sides, places, begin, end):
    """Run the tasks of a range; dA, dD and dbias are zero before."""
    call, place = calls[0], places[0]
    for task in range(begin, end):
        _enter_task(call, place, task)
        for direction in range(call.directions):
            side = sides[direction]
            place.direction = direction
            for at in range(place.h, place.h + GROUPS * call.quads * QUAD * WIDTH, WIDTH):
                store(at, splat(0.0))
            for chunk in range((call.tokens - 1) // CHUNK, -1, -1):
                _enter_chunk(call, side, place, chunk)
                _load_weights(kind, call, side, place)
                for group in range(_num_groups(call, place)):
                    _enter_group(call, place, group)
                    _prepare_group(kind, call, side, place)
                for q in range(0, QUAD * call.quads, QUAD):
                    _backward_quad(call, side, place, q)
                for group in range(_num_groups(call, place)):
                    _enter_group(call, place, group)
                    _finish_group(kind, call, side, place)


@compiled
def sum_blocks(kind, calls, sides, begin, end):
    """Gradients of B and C of a range of images: the sums over blocks of channels, in their order."""
    call = calls[0]
    wide = QUAD * call.quads * 4
    for image in range(begin, end):
        for direction in range(call.directions):
            side = sides[direction]
            for token in range(call.tokens):
                out = (image * call.tokens + token) * side.dBC_token
                for j in range(0, call.n, LANES):
                    lanes = min(LANES, call.n - j)
                    dB, dC = splat(0.0), splat(0.0)
                    for block in range(call.blocks):
                        row = ((image * call.blocks + block) * call.directions + direction) * call.tokens + token
                        at = call.dBC + row * 2 * wide + 4 * j
                        dB = dB + load_lanes(FLOAT32, at, lanes)
                        dC = dC + load_lanes(FLOAT32, at + wide, lanes)
                    store_lanes(kind, side.dB + out + j * call.size, lanes, dB)
                    store_lanes(kind, side.dC + out + j * call.size, lanes, dC)
