# mypy: ignore-errors
"""Kernels of the selective scan on a CPU for one state per channel, as VMamba's models have.

Tasks, strips and chunks are those of `scan_kernels_numba`. One state is little work per value read, so these kernels
walk the tokens in the outer loop and the vectors of channels in the inner one: each row is read once from end to end,
and a state waits in the first cache for the next token. The backward recomputes step sizes, decays and states of a
chunk into scratch, then runs the adjoint over its tokens from the last to the first.
"""

from .scan_adjoint_numba import LN_2, write_gate_gradient
from .scan_kernels_numba import (
    CHUNK,
    VECTORS,
    clear,
    dense_rows,
    enter_chunk,
    enter_strip,
    enter_vector,
    load_weights,
    rates_of,
    rows,
    stored_states,
    ungated_share,
    weight,
    write_sums,
)
from .subnormals_numba import flush_subnormals, restore_float_mode
from .vector_numba import (
    FLOAT32,
    LANES,
    WIDTH,
    accumulate,
    compiled,
    even_lanes,
    exp2,
    finish_streaming,
    load,
    load_lanes,
    sigmoid,
    softplus,
    softplus_and_slope,
    splat,
    splat_at,
    store,
    store_lanes,
    store_sums,
    stream_lanes,
)

_WEIGHTS = 3 * WIDTH  # bytes of a vector's A, bias and D in scratch
_KEPT = 4 * WIDTH  # bytes of a vector's step size, slope of softplus, decay and state at one token


def forward_scratch(blocks: int, padded: int) -> dict[str, int]:
    """Bytes of a thread's scratch in the forward, by field of PLACE, for a strip of blocks."""
    return {
        "h": blocks * VECTORS * WIDTH,
        "bc": CHUNK * 2 * padded * 4 + WIDTH,
        "weights": blocks * VECTORS * _WEIGHTS,
    }


def backward_scratch(blocks: int, padded: int) -> dict[str, int]:
    """Bytes of a thread's scratch in the backward, by field of PLACE, for a strip of blocks."""
    return {**forward_scratch(blocks, padded), "states": (CHUNK + 1) * blocks * VECTORS * _KEPT}


@compiled
def _copy_weights(call, operands, place):
    """Copy the strip's values of A, bias and D side by side to scratch, whole vectors."""
    for vector in range(place.vectors):
        enter_vector(call, place, vector)
        at = place.weights + vector * _WEIGHTS
        store(at, load(rates_of(call, place, 0)))
        store(at + WIDTH, weight(operands.delta_bias, place))
        store(at + 2 * WIDTH, weight(operands.D, place))


@compiled
def _store_states(call, place, h):
    """Keep the states after a chunk."""
    at = stored_states(call, place, place.chunk)
    for vector in range(place.vectors):
        lanes = call.channels - place.c - vector * LANES
        stream_lanes(FLOAT32, at + vector * WIDTH, lanes, load(h + vector * WIDTH))


@compiled
def _forward_chunk(kind, call, operands, place):
    """Output of the strip over one chunk."""
    step, share = place.step, ungated_share(call, place)
    u, u_step = rows(operands.u, operands.u_image, operands.u_token, place, call.size), step * operands.u_token
    delta = rows(operands.delta, operands.delta_image, operands.delta_token, place, call.size)
    delta_step = step * operands.delta_token
    z, z_step = rows(call.z, call.z_image, call.z_token, place, call.size), step * call.z_token
    out, out_step = dense_rows(call, call.out, place, call.size), step * call.channels * call.size
    total_at, total_step = rows(call.total, call.total_image, call.total_token, place, 4), step * call.total_token
    mixed_at, mixed_step = dense_rows(call, call.mixed, place, 4), step * call.channels * 4
    first, last = place.direction == 0, place.direction + 1 == call.directions
    gated, mixed, scale, apply_softplus = call.z != 0, call.mix != 0, splat(call.scale), call.softplus
    size, vectors, channels = call.size, place.vectors, call.channels - place.c
    states, bc = place.h, place.bc
    for _ in range(place.count):
        b, c, weights = splat_at(bc), splat_at(bc + call.padded * 4), place.weights
        for vector in range(vectors):
            at, wide, lanes = vector * LANES * size, vector * WIDTH, channels - vector * LANES
            dt = load_lanes(kind, delta + at, lanes) + load(weights + WIDTH)
            if apply_softplus:
                dt = softplus(dt)
            x = load_lanes(kind, u + at, lanes)
            state = exp2(dt * load(weights)) * load(states + wide) + dt * x * b
            store(states + wide, state)
            s = state * c
            total = s + load(weights + 2 * WIDTH) * x
            write_sums(
                *(kind, first, last, gated, mixed, scale, lanes, total, share * s),
                *(total_at + wide, mixed_at + wide, z + at, out + at),
            )
            weights += _WEIGHTS
        u += u_step
        delta += delta_step
        z += z_step
        out += out_step
        total_at += total_step
        mixed_at += mixed_step
        bc += 2 * call.padded * 4


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
            _copy_weights(call, operands, place)
            enter_vector(call, place, 0)
            clear(place.h, place.vectors * WIDTH)
            for chunk in range((call.tokens - 1) // CHUNK + 1):
                enter_chunk(call, operands, place, chunk)
                load_weights(kind, call, operands, place)
                _forward_chunk(kind, call, operands, place)
                _store_states(call, place, place.h)
    finish_streaming()
    restore_float_mode(mode)


@compiled
def _recompute_chunk(kind, call, operands, place):
    """Step sizes, slopes of softplus, decays and states of the strip over one chunk, after the states before it."""
    before = stored_states(call, place, place.chunk - 1)
    for vector in range(place.vectors):
        h = splat(0.0)
        if place.chunk > 0:
            h = load_lanes(FLOAT32, before + vector * WIDTH, call.channels - place.c - vector * LANES)
        store(place.states + vector * _KEPT + 3 * WIDTH, h)
    u = rows(operands.u, operands.u_image, operands.u_token, place, call.size)
    delta = rows(operands.delta, operands.delta_image, operands.delta_token, place, call.size)
    row = place.vectors * _KEPT
    for k in range(place.count):
        b = splat_at(place.bc + k * 4 * call.padded * 2)
        for vector in range(place.vectors):
            weights, kept = place.weights + vector * _WEIGHTS, place.states + k * row + vector * _KEPT
            at, lanes = vector * LANES * call.size, call.channels - place.c - vector * LANES
            dt, slope = load_lanes(kind, delta + at, lanes) + load(weights + WIDTH), splat(1.0)
            if call.softplus:
                dt, slope = softplus_and_slope(dt)
            decay = exp2(dt * load(weights))
            state = decay * load(kept + 3 * WIDTH) + dt * load_lanes(kind, u + at, lanes) * b
            kept += row
            store(kept, dt)
            store(kept + WIDTH, slope)
            store(kept + 2 * WIDTH, decay)
            store(kept + 3 * WIDTH, state)
        u += place.step * operands.u_token
        delta += place.step * operands.delta_token


@compiled
def _adjoint_token(kind, call, operands, place, k, block, share):
    """Gradients of one block of channels at one token of the chunk."""
    token, size, row = place.first + k * place.step, call.size, place.vectors * _KEPT
    channel = place.c * size
    u = operands.u + place.image * operands.u_image + token * operands.u_token + channel
    z = call.z + place.image * call.z_image + token * call.z_token + channel
    grad = call.grad + place.image * call.grad_image + token * call.grad_token + channel
    dz = call.dz + place.image * call.dz_image + token * call.dz_token + channel
    total_at = call.total + place.image * call.total_image + token * call.total_token + place.c * 4
    dense = ((place.image * call.tokens + token) * call.channels + place.c) * size
    bc = place.bc + k * 4 * call.padded * 2
    b, c = splat_at(bc), splat_at(bc + call.padded * 4)
    of_direction = place.image * call.directions + place.direction
    of_channels = (of_direction * call.lanes + place.c) * 4
    dA = call.dA + (of_direction * call.padded * call.lanes + place.c) * 4
    dB, dC = splat(0.0), splat(0.0)
    for vector in range(block * VECTORS, min((block + 1) * VECTORS, place.vectors)):
        weights, kept = place.weights + vector * _WEIGHTS, place.states + (k + 1) * row + vector * _KEPT
        at, wide, lanes = vector * LANES * size, vector * WIDTH, call.channels - place.c - vector * LANES
        x, dt, skip = load_lanes(kind, u + at, lanes), load(kept), load(weights + 2 * WIDTH)
        dy = splat(call.scale) * load_lanes(kind, grad + at, lanes)
        gated, state = dy, load(kept + 3 * WIDTH)
        if call.z:
            gate = load_lanes(kind, z + at, lanes)
            gated = dy * (gate * sigmoid(gate))
            read_out = state * c + skip * x
            write_gate_gradient(kind, call, place, lanes, read_out, total_at + wide, z + at, grad + at, dz + at)
        dy = gated + dy * share
        g = load(place.h + wide) + dy * c
        dB = dB + g * (dt * x)
        dC = dC + dy * state
        dinput = g * b
        g = g * load(kept + 2 * WIDTH)
        store(place.h + wide, g)
        change = g * load(kept - row + 3 * WIDTH)
        accumulate(dA + wide, change * dt)
        change = (change * load(weights) * splat(LN_2) + dinput * x) * load(kept + WIDTH)
        stream_lanes(kind, operands.du + dense + at, lanes, dinput * dt + skip * gated)
        stream_lanes(kind, operands.ddelta + dense + at, lanes, change)
        accumulate(call.dD + of_channels + wide, gated * x)
        accumulate(call.dbias + of_channels + wide, change)
    of_block = (place.image * call.blocks + place.first_block + block) * call.directions + place.direction
    out = call.sums + (of_block * call.tokens + token) * 2 * call.padded * 4
    store_sums(out, dB, splat(0.0), dC, splat(0.0))


@compiled
def backward(kind, calls, directions, places, begin, end):
    """Run the tasks of a range; dA, dD and dbias are zero before."""
    call, place = calls[0], places[0]
    mode = flush_subnormals()
    while begin < end:
        begin = enter_strip(call, place, begin, end)
        for direction in range(call.directions):
            operands = directions[direction]
            place.direction = direction
            _copy_weights(call, operands, place)
            enter_vector(call, place, 0)
            clear(place.h, place.vectors * WIDTH)
            share = ungated_share(call, place)
            for chunk in range((call.tokens - 1) // CHUNK, -1, -1):
                enter_chunk(call, operands, place, chunk)
                load_weights(kind, call, operands, place)
                _recompute_chunk(kind, call, operands, place)
                for k in range(place.count - 1, -1, -1):
                    for block in range(place.blocks):
                        _adjoint_token(kind, call, operands, place, k, block, share)
    finish_streaming()
    restore_float_mode(mode)


@compiled
def sum_blocks(kind, calls, directions, begin, end):
    """Gradients of B and C of a range of images: the sums over blocks of channels, in their order."""
    call = calls[0]
    mode = flush_subnormals()
    token = 2 * call.padded * 4  # bytes of a token's four values: sum for B, 0, sum for C, 0
    for image in range(begin, end):
        for direction in range(call.directions):
            out = directions[direction].dbc + image * call.tokens * 2 * call.size
            first = call.sums + (image * call.blocks * call.directions + direction) * call.tokens * token
            for k in range(0, call.tokens, 4):
                at, total = first + k * token, splat(0.0)
                for _ in range(call.blocks):
                    total = total + load_lanes(FLOAT32, at, 4 * (call.tokens - k))
                    at += call.directions * call.tokens * token
                store_lanes(kind, out + k * 2 * call.size, 2 * min(4, call.tokens - k), even_lanes(total))
    restore_float_mode(mode)
