# mypy: ignore-errors
"""Forward kernel of the selective scan on a CPU, and what it shares with the backward one.

A task is one image and one block of channels, all directions; sixteen channels are in the lanes of a vector. A thread
takes the blocks that it has of an image together, as a strip, and walks the tokens in chunks: a chunk of all rows of a
strip fits in the second cache, so memory is read in order. A chunk's step sizes are computed once per vector of
channels, then four states at a time run over its tokens in registers. Rows are read where they lie: addresses and
strides come in records, so no tensor is copied, and a reversed direction is a negative stride.
"""

import numpy as np

from .subnormals_numba import flush_subnormals, restore_float_mode
from .vector_numba import (
    FLOAT32,
    LANES,
    LOG2_E,
    SOURCE,
    WIDTH,
    compiled,
    exp2,
    finish_streaming,
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
    store_float,
    store_lanes,
    stream_lanes,
)

CHUNK = 32  # tokens between two stored states; what the backward keeps of a chunk fits in the first cache
VECTORS = 4  # of channels in a block
BLOCK = VECTORS * LANES
TOGETHER = 4  # states that run over a chunk together

# One direction: addresses of operands, their strides in bytes, and of contiguous gradients. A, D, delta_bias and their
# gradients are dense float32.
DIRECTION = record(
    "reverse",
    *(f"{tensor}{part}" for tensor in ("u", "delta", "bc") for part in ("", "_image", "_token")),
    *("A", "D", "delta_bias", "du", "ddelta", "dbc", "dA", "dD", "dbias"),
)
# What all directions share; z and mix are 0 where absent. `rates`: log2(e) A of every direction, transposed to (n, d)
# and padded with zeros to `padded` states and whole vectors. `total` and `mixed`: float32 (b, l, d), what the
# directions before the last one add to the gated and to the ungated sum; `mixed` is dense. `sums`: float32 sums of the
# gradients of bc over each block's channels, (b, blocks, directions, l, 2, padded). dA, dD, dbias: float32 sums over
# tokens per image.
CALL = record(
    *("images", "tokens", "channels", "lanes", "blocks", "n", "padded", "directions", "softplus", "size"),
    *("rates", "mix", "z", "z_image", "z_token", "out", "states"),
    *(f"{tensor}{part}" for tensor in ("grad", "dz", "total") for part in ("", "_image", "_token")),
    *("mixed", "sums", "dA", "dD", "dbias", SOURCE),
    scale=np.float64,
)
# Where a thread is, and its scratch. The strip is `blocks` blocks, `vectors` vectors from `first_block` on.
PLACE = record(
    *("image", "first_block", "blocks", "vectors", "block", "direction", "chunk", "first", "step", "count"),
    *("vector", "c", "lanes"),
    *("h", "bc", "dt", "input", "y", "dy", "gated", "slope", "ddt", "dinput", "decays", "states", "dbc", "weights"),
)


def padded_states(n: int) -> int:
    """Return the number of states that weights and sums have room for."""
    return 2 if n == 1 else -(-n // TOGETHER) * TOGETHER  # one state: four sums fill the rows of B and C


@compiled
def transpose_rates(calls, directions):
    """Write `rates` of every direction."""
    call = calls[0]
    for direction in range(call.directions):
        operands = directions[direction]
        rates = call.rates + direction * call.padded * call.lanes * 4
        for at in range(rates, rates + call.padded * call.lanes * 4, WIDTH):
            store(at, splat(0.0))
        for channel in range(call.channels):
            for s in range(call.n):
                rate = load_float(operands.A + (channel * call.n + s) * 4) * np.float32(LOG2_E)
                store_float(rates + (s * call.lanes + channel) * 4, rate)


@compiled
def sum_images(calls, directions):
    """Write the gradients of A, D and the bias of delta: the sums over images, in their order."""
    call = calls[0]
    row = call.lanes * 4
    for direction in range(call.directions):
        operands = directions[direction]
        for s in range(call.n + 2):
            rows, first, out, step = call.padded, call.dA + s * row, operands.dA + s * 4, call.n * 4
            if s == call.n:
                rows, first, out, step = 1, call.dD, operands.dD, 4
            if s == call.n + 1:
                rows, first, out, step = 1, call.dbias, operands.dbias, 4
            first += direction * rows * row
            for c in range(0, row, WIDTH):
                total = load(first + c)
                for image in range(1, call.images):
                    total = total + load(first + c + image * call.directions * rows * row)
                store(first + c, total)
            for channel in range(call.channels):
                store_float(out + channel * step, load_float(first + channel * 4))


def forward_scratch(blocks: int, padded: int) -> dict[str, int]:
    """Bytes of a thread's scratch in the forward, by field of PLACE, for a strip of blocks."""
    return {
        "h": blocks * VECTORS * padded * WIDTH,
        "bc": CHUNK * 2 * padded * 4 + WIDTH,
        **dict.fromkeys(("dt", "input", "y"), CHUNK * WIDTH),
    }


@compiled
def enter_strip(call, place, task, end):
    """Go to the blocks of a task's image that are in the range; return the first task after them."""
    place.image = task // call.blocks
    place.first_block = task % call.blocks
    place.blocks = min(end - task, call.blocks - place.first_block)
    channels = min(place.blocks * BLOCK, call.channels - place.first_block * BLOCK)
    place.vectors = (channels + LANES - 1) // LANES
    return task + place.blocks


@compiled
def enter_chunk(call, operands, place, chunk):
    """Go to the first token of a chunk, in the direction of the scan."""
    place.chunk = chunk
    place.count = min(CHUNK, call.tokens - chunk * CHUNK)
    place.first, place.step = chunk * CHUNK, 1
    if operands.reverse:
        place.first, place.step = call.tokens - 1 - chunk * CHUNK, -1


@compiled
def enter_vector(call, place, vector):
    """Go to a vector of channels of the strip."""
    place.vector = vector
    place.c = place.first_block * BLOCK + vector * LANES
    place.lanes = min(LANES, call.channels - place.c)


@compiled
def clear(address, size):
    """Write zeros to scratch, whole vectors."""
    for at in range(address, address + size, WIDTH):
        store(at, splat(0.0))


@compiled
def load_weights(kind, call, operands, place):
    """Copy a chunk's rows of B and C, padded with zeros, side by side to scratch as float32."""
    row = call.padded * 4
    at = place.bc
    b_row = operands.bc + place.image * operands.bc_image + place.first * operands.bc_token
    for _ in range(place.count):
        # A vector may run over into what is written after it; the last one into room left for it.
        for j in range(0, call.n, LANES):
            store(at + 4 * j, load_lanes(kind, b_row + j * call.size, call.n - j))
        for j in range(0, call.n, LANES):
            store(at + row + 4 * j, load_lanes(kind, b_row + (call.n + j) * call.size, call.n - j))
        at += 2 * row
        b_row += place.step * operands.bc_token


@compiled
def weight(address, place):
    """A vector's values of a float32 tensor over channels."""
    return load_lanes(FLOAT32, address + 4 * place.c, place.lanes)


@compiled
def rates_of(call, place, s):
    """Address of a vector's rates of a state."""
    return call.rates + ((place.direction * call.padded + s) * call.lanes + place.c) * 4


@compiled
def ungated_share(call, place):
    """Ungated share of the direction's read-out in the output, Semi-ViM Eq. (16)."""
    if call.mix == 0:
        return splat(0.0)
    return splat(load_float(call.mix + 4 * (place.image * call.directions + place.direction)))


@compiled
def _run_states(a_at, a_state, h, bc, row, dt, entering, y, count):
    """Run four states over a chunk; add their read-out to y."""
    a0, a1, a2, a3 = load(a_at), load(a_at + a_state), load(a_at + 2 * a_state), load(a_at + 3 * a_state)
    h0, h1, h2, h3 = load(h), load(h + WIDTH), load(h + 2 * WIDTH), load(h + 3 * WIDTH)
    for _ in range(count):
        step, x = load(dt), load(entering)
        h0 = exp2(step * a0) * h0 + x * splat_at(bc)
        h1 = exp2(step * a1) * h1 + x * splat_at(bc + 4)
        h2 = exp2(step * a2) * h2 + x * splat_at(bc + 8)
        h3 = exp2(step * a3) * h3 + x * splat_at(bc + 12)
        c = bc + row
        read = (h0 * splat_at(c) + h1 * splat_at(c + 4)) + (h2 * splat_at(c + 8) + h3 * splat_at(c + 12))
        store(y, load(y) + read)
        bc += 2 * row
        dt += WIDTH
        entering += WIDTH
        y += WIDTH
    store(h, h0)
    store(h + WIDTH, h1)
    store(h + 2 * WIDTH, h2)
    store(h + 3 * WIDTH, h3)


@compiled
def stored_states(call, place, chunk):
    """Address of the states after a chunk at the current channels, ``n`` rows of all channels."""
    chunks = (call.tokens - 1) // CHUNK + 1
    row = (place.image * call.directions + place.direction) * chunks + chunk
    return call.states + (row * call.n * call.channels + place.c) * 4


@compiled
def _store_states(call, place, h):
    """Keep the states after a chunk."""
    at = stored_states(call, place, place.chunk)
    for s in range(call.n):
        stream_lanes(FLOAT32, at + s * call.channels * 4, place.lanes, load(h + s * WIDTH))


@compiled
def rows(address, image, token, place, size):
    """Address of the current channels in a tensor's row at the first token of the chunk."""
    return address + place.image * image + place.first * token + place.c * size


@compiled
def dense_rows(call, address, place, size):
    """The same in a contiguous tensor (b, l, d)."""
    row = call.channels * size
    return rows(address, call.tokens * row, row, place, size)


@compiled
def _prepare_forward(kind, call, operands, place):
    """Step sizes and inputs of one vector of channels over one chunk; asks for the rows needed after them."""
    dt, entering, y, lanes, bias = place.dt, place.input, place.y, place.lanes, weight(operands.delta_bias, place)
    u, u_step = rows(operands.u, operands.u_image, operands.u_token, place, call.size), place.step * operands.u_token
    delta = rows(operands.delta, operands.delta_image, operands.delta_token, place, call.size)
    delta_step = place.step * operands.delta_token
    z, z_step = rows(call.z, call.z_image, call.z_token, place, call.size), place.step * call.z_token
    total, total_step = rows(call.total, call.total_image, call.total_token, place, 4), place.step * call.total_token
    next_u = next_delta = LANES * call.size
    if place.vector + 1 == place.vectors:
        next_u = CHUNK * u_step - place.vector * LANES * call.size
        next_delta = CHUNK * delta_step - place.vector * LANES * call.size
    apply_softplus = call.softplus
    for _ in range(place.count):
        prefetch(u + next_u)
        prefetch(delta + next_delta)
        prefetch(z)
        prefetch(total)
        x = load_lanes(kind, delta, lanes) + bias
        if apply_softplus:
            x = softplus(x)
        store(dt, x)
        store(entering, x * load_lanes(kind, u, lanes))
        store(y, splat(0.0))
        dt += WIDTH
        entering += WIDTH
        y += WIDTH
        u += u_step
        delta += delta_step
        z += z_step
        total += total_step


@compiled
def write_sums(kind, first, last, gated, mixed, scale, lanes, total, ungated, total_at, mixed_at, z, out):  # noqa: PLR0913
    """Add a direction's gated and ungated sums to those before it; write the output with the last one's."""
    if not first:
        total = total + load_lanes(FLOAT32, total_at, lanes)
        if mixed:
            ungated = ungated + load_lanes(FLOAT32, mixed_at, lanes)
    if last:
        if gated:
            gate = load_lanes(kind, z, lanes)
            total = total * (gate * sigmoid(gate))
        store_lanes(kind, out, lanes, scale * (total + ungated))
    else:
        store_lanes(FLOAT32, total_at, lanes, total)
        if mixed:
            store_lanes(FLOAT32, mixed_at, lanes, ungated)


@compiled
def _finish_forward(kind, call, operands, place):
    """Add a direction's sums of a vector of channels over a chunk; write the output with the last one's."""
    y, lanes, step, skip, share = (
        place.y,
        place.lanes,
        place.step,
        weight(operands.D, place),
        ungated_share(call, place),
    )
    u, u_step = rows(operands.u, operands.u_image, operands.u_token, place, call.size), step * operands.u_token
    z, z_step = rows(call.z, call.z_image, call.z_token, place, call.size), step * call.z_token
    out, out_step = dense_rows(call, call.out, place, call.size), step * call.channels * call.size
    total_at, total_step = rows(call.total, call.total_image, call.total_token, place, 4), step * call.total_token
    mixed_at, mixed_step = dense_rows(call, call.mixed, place, 4), step * call.channels * 4
    first, last = place.direction == 0, place.direction + 1 == call.directions
    gated, mixed, scale = call.z != 0, call.mix != 0, splat(call.scale)
    for _ in range(place.count):
        s = load(y)
        total = s + skip * load_lanes(kind, u, lanes)
        write_sums(kind, first, last, gated, mixed, scale, lanes, total, share * s, total_at, mixed_at, z, out)
        y += WIDTH
        u += u_step
        z += z_step
        out += out_step
        total_at += total_step
        mixed_at += mixed_step


@compiled
def _forward_vector(kind, call, operands, place):
    """Output of one vector of channels over one chunk."""
    _prepare_forward(kind, call, operands, place)
    row, a_state = call.padded * 4, call.lanes * 4
    h = place.h + place.vector * call.padded * WIDTH
    for s in range(0, call.padded, TOGETHER):
        a_at = rates_of(call, place, s)
        _run_states(a_at, a_state, h + s * WIDTH, place.bc + 4 * s, row, place.dt, place.input, place.y, place.count)
    _store_states(call, place, h)
    _finish_forward(kind, call, operands, place)


@compiled
def forward(kind, calls, directions, places, begin, end):
    """Run the tasks of a range."""
    call, place = calls[0], places[0]
    mode = flush_subnormals()
    while begin < end:
        begin = enter_strip(call, place, begin, end)
        for direction in range(call.directions):
            operands = directions[direction]
            place.direction = direction
            clear(place.h, place.vectors * call.padded * WIDTH)
            for chunk in range((call.tokens - 1) // CHUNK + 1):
                enter_chunk(call, operands, place, chunk)
                load_weights(kind, call, operands, place)
                for vector in range(place.vectors):
                    enter_vector(call, place, vector)
                    _forward_vector(kind, call, operands, place)
    finish_streaming()
    restore_float_mode(mode)
