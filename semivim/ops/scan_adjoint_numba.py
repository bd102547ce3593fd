# mypy: ignore-errors
"""Backward kernel of the selective scan on a CPU.

It walks the chunks from the last: recomputes the states and decays of a chunk from the stored state before it, then
runs the adjoint, so that forward and backward take two exponentials per state. Gradients of B and C are sums over
channels: over a block's vectors, over lanes once per chunk, over blocks at the end, always in the same order.
"""

from .scan_kernels_numba import (
    BLOCK,
    CHUNK,
    TOGETHER,
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
)
from .subnormals_numba import flush_subnormals, restore_float_mode
from .vector_numba import (
    FLOAT32,
    LANES,
    WIDTH,
    accumulate,
    compiled,
    exp2,
    finish_streaming,
    load,
    load_lanes,
    prefetch,
    sigmoid,
    softplus_and_slope,
    splat,
    splat_at,
    store,
    store_lanes,
    store_sums,
    stream_lanes,
)

LN_2 = 0.6931471805599453


def backward_scratch(blocks: int, padded: int) -> dict[str, int]:
    """Bytes of a thread's scratch in the backward, by field of PLACE, for a strip of blocks."""
    return {
        "h": blocks * VECTORS * padded * WIDTH,
        "bc": CHUNK * 2 * padded * 4 + WIDTH,
        **dict.fromkeys(("dt", "input", "y", "dy", "gated", "slope", "ddt", "dinput"), VECTORS * CHUNK * WIDTH),
        "decays": CHUNK * TOGETHER * WIDTH,
        "states": (CHUNK + 1) * TOGETHER * WIDTH,
        "dbc": CHUNK * 2 * TOGETHER * WIDTH,
    }


@compiled
def _recompute_states(a_at, a_state, decays, states, bc, row, dt, entering, y, count):
    """Four decays and states of a chunk's tokens, from the states before it; add the read-out to y."""
    a0, a1, a2, a3 = load(a_at), load(a_at + a_state), load(a_at + 2 * a_state), load(a_at + 3 * a_state)
    h0, h1, h2, h3 = load(states), load(states + WIDTH), load(states + 2 * WIDTH), load(states + 3 * WIDTH)
    for _ in range(count):
        step, x = load(dt), load(entering)
        e0, e1, e2, e3 = exp2(step * a0), exp2(step * a1), exp2(step * a2), exp2(step * a3)
        store(decays, e0)
        store(decays + WIDTH, e1)
        store(decays + 2 * WIDTH, e2)
        store(decays + 3 * WIDTH, e3)
        h0 = e0 * h0 + x * splat_at(bc)
        h1 = e1 * h1 + x * splat_at(bc + 4)
        h2 = e2 * h2 + x * splat_at(bc + 8)
        h3 = e3 * h3 + x * splat_at(bc + 12)
        states += 4 * WIDTH
        store(states, h0)
        store(states + WIDTH, h1)
        store(states + 2 * WIDTH, h2)
        store(states + 3 * WIDTH, h3)
        c = bc + row
        read = (h0 * splat_at(c) + h1 * splat_at(c + 4)) + (h2 * splat_at(c + 8) + h3 * splat_at(c + 12))
        store(y, load(y) + read)
        bc += 2 * row
        decays += 4 * WIDTH
        dt += WIDTH
        entering += WIDTH
        y += WIDTH


@compiled
def _adjoint_states(a_at, a_state, g, dA, decays, states, bc, row, dt, entering, dy, ddt, dinput, dbc, count):  # noqa: PLR0913
    """Adjoint of four states over a chunk, from its last token; adds to dA, ddt, dinput = sum of g B, dbc."""
    a0, a1, a2, a3 = load(a_at), load(a_at + a_state), load(a_at + 2 * a_state), load(a_at + 3 * a_state)
    g0, g1, g2, g3 = load(g), load(g + WIDTH), load(g + 2 * WIDTH), load(g + 3 * WIDTH)
    d0, d1, d2, d3 = load(dA), load(dA + a_state), load(dA + 2 * a_state), load(dA + 3 * a_state)
    for k in range(count - 1, -1, -1):
        b, at = bc + 2 * row * k, k * WIDTH
        step, x, up = load(dt + at), load(entering + at), load(dy + at)
        g0 = g0 + up * splat_at(b + row)
        g1 = g1 + up * splat_at(b + row + 4)
        g2 = g2 + up * splat_at(b + row + 8)
        g3 = g3 + up * splat_at(b + row + 12)
        add = dbc + 8 * at
        accumulate(add, g0 * x)
        accumulate(add + WIDTH, g1 * x)
        accumulate(add + 2 * WIDTH, g2 * x)
        accumulate(add + 3 * WIDTH, g3 * x)
        h = states + 4 * at
        accumulate(add + 4 * WIDTH, up * load(h + 4 * WIDTH))
        accumulate(add + 5 * WIDTH, up * load(h + 5 * WIDTH))
        accumulate(add + 6 * WIDTH, up * load(h + 6 * WIDTH))
        accumulate(add + 7 * WIDTH, up * load(h + 7 * WIDTH))
        accumulate(
            dinput + at, (g0 * splat_at(b) + g1 * splat_at(b + 4)) + (g2 * splat_at(b + 8) + g3 * splat_at(b + 12))
        )
        e = decays + 4 * at
        g0 = g0 * load(e)
        g1 = g1 * load(e + WIDTH)
        g2 = g2 * load(e + 2 * WIDTH)
        g3 = g3 * load(e + 3 * WIDTH)
        w0, w1, w2, w3 = g0 * load(h), g1 * load(h + WIDTH), g2 * load(h + 2 * WIDTH), g3 * load(h + 3 * WIDTH)
        accumulate(ddt + at, (w0 * a0 + w1 * a1) + (w2 * a2 + w3 * a3))
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
def _prepare_backward(kind, call, operands, place, scratch):
    """Step sizes and read-out gradients of one vector of channels over one chunk; asks for the next block's rows."""
    lanes, step = place.lanes, place.step
    bias, share, zero, scale = (
        weight(operands.delta_bias, place),
        ungated_share(call, place),
        splat(0.0),
        splat(call.scale),
    )
    u, u_step = rows(operands.u, operands.u_image, operands.u_token, place, call.size), step * operands.u_token
    delta = rows(operands.delta, operands.delta_image, operands.delta_token, place, call.size)
    delta_step = step * operands.delta_token
    z, z_step = rows(call.z, call.z_image, call.z_token, place, call.size), step * call.z_token
    grad = rows(call.grad, call.grad_image, call.grad_token, place, call.size)
    grad_step = step * call.grad_token
    next_u = next_delta = next_z = next_grad = BLOCK * call.size
    if place.block + 1 == place.blocks:
        back = place.block * BLOCK * call.size
        next_u, next_delta = -CHUNK * u_step - back, -CHUNK * delta_step - back
        next_z, next_grad = -CHUNK * z_step - back, -CHUNK * grad_step - back
    apply_softplus, has_gate = call.softplus, call.z != 0
    for k in range(scratch, scratch + place.count * WIDTH, WIDTH):
        prefetch(u + next_u)
        prefetch(delta + next_delta)
        prefetch(z + next_z)
        prefetch(grad + next_grad)
        x, slope = load_lanes(kind, delta, lanes) + bias, splat(1.0)
        if apply_softplus:
            x, slope = softplus_and_slope(x)
        store(place.slope + k, slope)
        store(place.dt + k, x)
        store(place.input + k, x * load_lanes(kind, u, lanes))
        dy = scale * load_lanes(kind, grad, lanes)
        gated = dy
        if has_gate:
            gate = load_lanes(kind, z, lanes)
            gated = dy * (gate * sigmoid(gate))
        store(place.gated + k, gated)
        store(place.dy + k, gated + dy * share)
        store(place.y + k, zero)
        store(place.ddt + k, zero)
        store(place.dinput + k, zero)
        u += u_step
        delta += delta_step
        z += z_step
        grad += grad_step


@compiled
def _load_states(call, place, s):
    """Four states before the chunk, where the recomputation starts from."""
    at = stored_states(call, place, place.chunk - 1)
    for k in range(TOGETHER):
        h = splat(0.0)
        if place.chunk > 0 and s + k < call.n:
            h = load_lanes(FLOAT32, at + (s + k) * call.channels * 4, place.lanes)
        store(place.states + k * WIDTH, h)


@compiled
def _backward_states(call, place, first, end, s):
    """Recomputation and adjoint of four states of a block over one chunk; sums of dB and dC over its channels."""
    row, a_state, count = call.padded * 4, call.lanes * 4, place.count
    bc = place.bc + 4 * s
    clear(place.dbc, count * 8 * WIDTH)
    for vector in range(first, end):
        enter_vector(call, place, vector)
        _load_states(call, place, s)
        at = (vector - first) * CHUNK * WIDTH
        dt, entering, y, dy = place.dt + at, place.input + at, place.y + at, place.dy + at
        a_at = rates_of(call, place, s)
        _recompute_states(a_at, a_state, place.decays, place.states, bc, row, dt, entering, y, count)
        g = place.h + (vector * call.padded + s) * WIDTH
        of_states = (place.image * call.directions + place.direction) * call.padded + s
        dA = call.dA + of_states * a_state + 4 * place.c
        ddt, dinput = place.ddt + at, place.dinput + at
        _adjoint_states(
            a_at, a_state, g, dA, place.decays, place.states, bc, row, dt, entering, dy, ddt, dinput, place.dbc, count
        )
    block = place.image * call.blocks + place.first_block + place.block
    token = (block * call.directions + place.direction) * call.tokens + place.first
    for k in range(count):
        out = call.sums + (token + k * place.step) * 2 * row + 4 * s
        v = place.dbc + k * 8 * WIDTH
        store_sums(out, load(v), load(v + WIDTH), load(v + 2 * WIDTH), load(v + 3 * WIDTH))
        v += 4 * WIDTH
        store_sums(out + row, load(v), load(v + WIDTH), load(v + 2 * WIDTH), load(v + 3 * WIDTH))


@compiled
def _finish_backward(kind, call, operands, place, scratch):
    """Gradients of u, delta, D and the bias of one vector of channels over one chunk; adds D u to the read-out."""
    lanes, step, skip = place.lanes, place.step, weight(operands.D, place)
    u, u_step = rows(operands.u, operands.u_image, operands.u_token, place, call.size), step * operands.u_token
    out, out_step = dense_rows(call, 0, place, call.size), step * call.channels * call.size
    du, ddelta = operands.du + out, operands.ddelta + out
    sums = ((place.image * call.directions + place.direction) * call.lanes + place.c) * 4
    dD, dbias, ln_2 = load(call.dD + sums), load(call.dbias + sums), splat(LN_2)
    for k in range(scratch, scratch + place.count * WIDTH, WIDTH):
        x, gated, dinput = load_lanes(kind, u, lanes), load(place.gated + k), load(place.dinput + k)
        stream_lanes(kind, du, lanes, dinput * load(place.dt + k) + skip * gated)
        change = (load(place.ddt + k) * ln_2 + dinput * x) * load(place.slope + k)
        stream_lanes(kind, ddelta, lanes, change)
        dD = dD + gated * x
        dbias = dbias + change
        accumulate(place.y + k, skip * x)
        u += u_step
        du += out_step
        ddelta += out_step
    store(call.dD + sums, dD)
    store(call.dbias + sums, dbias)


@compiled
def write_gate_gradient(kind, call, place, lanes, total, total_at, z, grad, dz):
    """Add a direction's gated sums to those before it; write dz with the last one's."""
    if place.direction > 0:
        total = total + load_lanes(FLOAT32, total_at, lanes)
    if place.direction + 1 == call.directions:
        gate = load_lanes(kind, z, lanes)
        s, one = sigmoid(gate), splat(1.0)
        slope = s * (one + gate * (one - s))
        store_lanes(kind, dz, lanes, splat(call.scale) * load_lanes(kind, grad, lanes) * slope * total)
    else:
        store_lanes(FLOAT32, total_at, lanes, total)


@compiled
def _differentiate_gate(kind, call, place, y):
    """Add a direction's sums of a vector of channels over a chunk; write dz with the last one's."""
    lanes, step = place.lanes, place.step
    z, z_step = rows(call.z, call.z_image, call.z_token, place, call.size), step * call.z_token
    grad = rows(call.grad, call.grad_image, call.grad_token, place, call.size)
    grad_step = step * call.grad_token
    dz, dz_step = rows(call.dz, call.dz_image, call.dz_token, place, call.size), step * call.dz_token
    total_at, total_step = rows(call.total, call.total_image, call.total_token, place, 4), step * call.total_token
    for _ in range(place.count):
        write_gate_gradient(kind, call, place, lanes, load(y), total_at, z, grad, dz)
        y += WIDTH
        z += z_step
        grad += grad_step
        dz += dz_step
        total_at += total_step


@compiled
def _backward_block(kind, call, operands, place, block):
    """Gradients of one block of channels over one chunk."""
    place.block = block
    first = block * VECTORS
    end = min(first + VECTORS, place.vectors)
    for vector in range(first, end):
        enter_vector(call, place, vector)
        _prepare_backward(kind, call, operands, place, (vector - first) * CHUNK * WIDTH)
    for s in range(0, call.padded, TOGETHER):
        _backward_states(call, place, first, end, s)
    for vector in range(first, end):
        enter_vector(call, place, vector)
        at = (vector - first) * CHUNK * WIDTH
        _finish_backward(kind, call, operands, place, at)
        if call.z:
            _differentiate_gate(kind, call, place, place.y + at)


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
            clear(place.h, place.vectors * call.padded * WIDTH)
            for chunk in range((call.tokens - 1) // CHUNK, -1, -1):
                enter_chunk(call, operands, place, chunk)
                load_weights(kind, call, operands, place)
                for block in range(place.blocks):
                    _backward_block(kind, call, operands, place, block)
    finish_streaming()
    restore_float_mode(mode)


@compiled
def sum_blocks(kind, calls, directions, begin, end):
    """Gradients of B and C of a range of images: the sums over blocks of channels, in their order."""
    call = calls[0]
    mode = flush_subnormals()
    row = call.padded * 4
    for image in range(begin, end):
        for direction in range(call.directions):
            operands = directions[direction]
            for token in range(call.tokens):
                out = operands.dbc + (image * call.tokens + token) * 2 * call.n * call.size
                for j in range(0, call.n, LANES):
                    lanes = min(LANES, call.n - j)
                    dB, dC = splat(0.0), splat(0.0)
                    for block in range(call.blocks):
                        of = ((image * call.blocks + block) * call.directions + direction) * call.tokens + token
                        at = call.sums + of * 2 * row + 4 * j
                        dB = dB + load_lanes(FLOAT32, at, lanes)
                        dC = dC + load_lanes(FLOAT32, at + row, lanes)
                    store_lanes(kind, out + j * call.size, lanes, dB)
                    store_lanes(kind, out + (call.n + j) * call.size, lanes, dC)
    restore_float_mode(mode)
