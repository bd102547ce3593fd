# mypy: ignore-errors
"""Forward kernel of the selective scan on a CPU, and what it shares with the backward one.

A task is one image and one block of channels, all directions; sixteen channels are in the lanes of a vector. It walks
the tokens in chunks: a chunk's step sizes are computed once, then four states at a time run over its tokens in
registers. Rows are read where they lie: addresses and strides come in records, so no tensor is copied, and a reversed
direction is a negative stride. Rows of a block lie far apart, so each vector of channels asks for the next one's rows.
"""

import numpy as np

from .scan_reference import CHUNK
from .subnormals_numba import flush_subnormals, restore_float_mode
from .vector_numba import (
    FLOAT32,
    LANES,
    SOURCE,
    WIDTH,
    compiled,
    exp2,
    load,
    load_float,
    load_lanes,
    prefetch,
    record,
    sigmoid,
    softplus,
    splat,
    splat_at,
    store,
    store_lanes,
)

GROUPS = 4  # vectors of channels in a task
BLOCK = GROUPS * LANES
QUAD = 4  # states that run over a chunk together

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


@compiled
def enter_task(call, place, task):
    """Go to the image and the block of channels of a task."""
    place.image = task // call.blocks
    place.block = task % call.blocks


@compiled
def enter_chunk(call, side, place, chunk):
    """Go to the first token of a chunk, in the direction of the scan."""
    place.chunk = chunk
    place.count = min(CHUNK, call.tokens - chunk * CHUNK)
    place.first, place.step = chunk * CHUNK, 1
    if side.reverse:
        place.first, place.step = call.tokens - 1 - chunk * CHUNK, -1


@compiled
def enter_group(call, place, group):
    """Go to a vector of channels of the block."""
    place.group = group
    place.c = place.block * BLOCK + group * LANES
    place.lanes = min(LANES, call.channels - place.c)


@compiled
def num_groups(call, place):
    """Return the number of vectors of channels in the block."""
    return min(GROUPS, (call.channels - place.block * BLOCK + LANES - 1) // LANES)


@compiled
def load_weights(kind, call, side, place):
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
def weight(address, place):
    """A group's values of a float32 tensor over channels, zeros for an absent one."""
    if address == 0:
        return splat(0.0)
    return load_lanes(FLOAT32, address + 4 * place.c, place.lanes)


@compiled
def ungated_share(side, place):
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
def rows(address, image, token, place, size):
    """Address of the current channels in a tensor's row at the first token of the chunk."""
    return address + place.image * image + place.first * token + place.c * size


@compiled
def _prepare_forward(kind, call, side, place):
    """Step sizes and inputs of one vector of channels over one chunk; asks for the rows needed after them."""
    dt, du, y, lanes, bias = place.dt, place.du, place.y, place.lanes, weight(side.bias, place)
    u, u_step = rows(side.u, side.u_image, side.u_token, place, call.size), place.step * side.u_token
    delta = rows(side.delta, side.delta_image, side.delta_token, place, call.size)
    delta_step = place.step * side.delta_token
    z, z_step = rows(call.z, call.z_image, call.z_token, place, call.size), place.step * call.z_token
    u_ahead = delta_ahead = LANES * call.size
    if place.group + 1 == num_groups(call, place):
        u_ahead = CHUNK * u_step - place.group * LANES * call.size
        delta_ahead = CHUNK * delta_step - place.group * LANES * call.size
    apply_softplus = call.softplus
    for _ in range(place.count):
        prefetch(u + u_ahead)
        prefetch(delta + delta_ahead)
        prefetch(z)
        x = load_lanes(kind, delta, lanes) + bias
        if apply_softplus:
            x = softplus(x)
        store(dt, x)
        store(du, x * load_lanes(kind, u, lanes))
        store(y, splat(0.0))
        dt += WIDTH
        du += WIDTH
        y += WIDTH
        u += u_step
        delta += delta_step
        z += z_step


@compiled
def _finish_forward(kind, call, side, place):
    """Keep the first direction's sums of a vector of channels over a chunk; write the output with the last one's."""
    y, lanes, step, skip, leak = place.y, place.lanes, place.step, weight(side.D, place), ungated_share(side, place)
    u, u_step = rows(side.u, side.u_image, side.u_token, place, call.size), step * side.u_token
    z, z_step = rows(call.z, call.z_image, call.z_token, place, call.size), step * call.z_token
    row = call.channels * call.size
    out, out_step = rows(call.out, call.tokens * row, row, place, call.size), step * row
    kept, kept_step = (place.first * GROUPS + place.group) * WIDTH, step * GROUPS * WIDTH
    total_at, mix_at = place.total + kept, place.mix + kept
    first, last = place.direction == 0, place.direction + 1 == call.directions
    gated, mixed, scale = call.z != 0, side.leak != 0, splat(call.scale)
    for _ in range(place.count):
        s = load(y)
        total, mix = s + skip * load_lanes(kind, u, lanes), leak * s
        if not first:
            total = total + load(total_at)
            if mixed:
                mix = mix + load(mix_at)
        if last:
            if gated:
                gate = load_lanes(kind, z, lanes)
                total = total * (gate * sigmoid(gate))
            store_lanes(kind, out, lanes, scale * (total + mix))
        else:
            store(total_at, total)
            if mixed:
                store(mix_at, mix)
        y += WIDTH
        u += u_step
        z += z_step
        out += out_step
        total_at += kept_step
        mix_at += kept_step


@compiled
def _forward_group(kind, call, side, place):
    """Output of one vector of channels over one chunk."""
    _prepare_forward(kind, call, side, place)
    wide, a_state = QUAD * call.quads * 4, call.lanes * 4
    h = place.h + place.group * call.quads * QUAD * WIDTH
    for q in range(0, QUAD * call.quads, QUAD):
        a_at = side.A + q * a_state + 4 * place.c
        _run_quad(a_at, a_state, h + q * WIDTH, place.bc + 4 * q, wide, place.dt, place.du, place.y, place.count)
    _store_states(call, place)
    _finish_forward(kind, call, side, place)


@compiled
def forward(kind, calls, sides, places, begin, end):
    """Run the tasks of a range."""
    call, place = calls[0], places[0]
    mode = flush_subnormals()
    for task in range(begin, end):
        enter_task(call, place, task)
        for direction in range(call.directions):
            side = sides[direction]
            place.direction = direction
            for at in range(place.h, place.h + GROUPS * call.quads * QUAD * WIDTH, WIDTH):
                store(at, splat(0.0))
            for chunk in range((call.tokens - 1) // CHUNK + 1):
                enter_chunk(call, side, place, chunk)
                load_weights(kind, call, side, place)
                for group in range(num_groups(call, place)):
                    enter_group(call, place, group)
                    _forward_group(kind, call, side, place)
    restore_float_mode(mode)
