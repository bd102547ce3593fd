# mypy: ignore-errors
"""Kernels of the causal convolution with SiLU in one or both directions, rows read where they lie.

Sixteen channels are in the lanes of a vector. A task is one image and one block of channels; it takes some steps of one
vector after the other. At step t the causal direction stands at token t and the other one at token t - 3, so both read
the tokens t - 3 to t, which wait in registers as the backward's last gradients do. Gradients of weights and biases are
summed over tokens per image, then over images in their order.
"""

from .subnormals_numba import flush_subnormals, restore_float_mode
from .vector_numba import (
    LANES,
    SOURCE,
    WIDTH,
    compiled,
    load,
    load_float,
    load_lanes,
    prefetch,
    record,
    sigmoid,
    splat,
    store,
    store_float,
    store_lanes,
)

TAPS = 4  # fewer are zeros before the first one
BACK = TAPS - 1  # tokens by which the direction that runs from the last token stands behind
VECTORS = 4  # vectors of channels in a task
STEPS = 64  # of one vector before the next one: their rows of all vectors fit in the first cache
PREFETCHED = 24  # tokens ahead of the one in use; rows lie too far apart for a processor to guess them
BLOCK = VECTORS * LANES
ROW = 4 * BLOCK  # bytes of a tap of all channels of a task
SUMS = TAPS + 1  # gradients of a direction's taps, and last of its bias
KEPT = 2 * (BACK + SUMS)  # vectors that a backward keeps from one run of steps to the next

# Addresses and strides in bytes. Where a direction is absent its weight (channels, 1, taps), bias, u, grad and
# gradients are 0; weights, biases and their gradients are dense float32. `sums` holds float32 sums over tokens, by
# image, direction and tap, the bias last: (images, 2, SUMS, lanes).
CALL = record(
    *("images", "tokens", "channels", "lanes", "blocks", "taps", "size", "sums", SOURCE),
    *(f"{name}{part}" for name in ("x", "grad", "grad_b", "dx") for part in ("", "_image", "_token")),
    *(f"{name}{end}" for end in ("", "_b") for name in ("weight", "bias", "u", "dweight", "dbias")),
)


def forward_scratch() -> int:
    """Bytes in which a task keeps the weights of its channels, the taps and last the bias of each direction."""
    return 2 * SUMS * ROW


def backward_scratch() -> int:
    """Bytes of a task's weights, and of what its backward keeps of each vector."""
    return forward_scratch() + VECTORS * KEPT * WIDTH


@compiled
def _pack_weights(call, block, packed):
    """Copy the weights of a block's channels to lanes, zeros for taps, channels and directions that do not exist."""
    before = TAPS - call.taps
    for direction in range(2):
        weight, bias = call.weight, call.bias
        if direction == 1:
            weight, bias = call.weight_b, call.bias_b
        at = packed + direction * SUMS * ROW
        for lane in range(BLOCK):
            channel = block * BLOCK + lane
            exists = weight != 0 and channel < call.channels
            for j in range(TAPS):
                read = exists and j >= before
                tap = load_float(weight + (channel * call.taps + j - before) * 4) if read else 0.0
                store_float(at + j * ROW + lane * 4, tap)
            store_float(at + TAPS * ROW + lane * 4, load_float(bias + channel * 4) if exists else 0.0)


@compiled
def _five(at, step):
    """Five vectors, step bytes apart: of a direction's taps and bias, or of their gradients."""
    return load(at), load(at + step), load(at + 2 * step), load(at + 3 * step), load(at + 4 * step)


@compiled
def _keep(at, values):
    """Write vectors side by side; return the address behind them."""
    for value in values:
        store(at, value)
        at += WIDTH
    return at


@compiled
def _token(kind, call, x, token, lanes):
    """One token's values of a vector, zeros before the first and after the last."""
    if 0 <= token < call.tokens:
        return load_lanes(kind, x + token * call.x_token, lanes)
    return splat(0.0)


@compiled
def _tokens_before(kind, call, x, t, lanes):
    """Tokens t - 3, t - 2 and t - 1."""
    return (
        _token(kind, call, x, t - 3, lanes),
        _token(kind, call, x, t - 2, lanes),
        _token(kind, call, x, t - 1, lanes),
    )


@compiled
def _forward_steps(kind, call, x, out, lanes, packed, first, last):
    """Output of a vector for steps first to last; x, out and packed are at the task's image and channels."""
    w0, w1, w2, w3, bias = _five(packed, ROW)
    v0, v1, v2, v3, bias_b = _five(packed + SUMS * ROW, ROW)
    x0, x1, x2 = _tokens_before(kind, call, x, first, lanes)
    row = call.channels * call.size
    for t in range(first, last):
        x3 = _token(kind, call, x, t, lanes)
        prefetch(x + (t + PREFETCHED) * call.x_token)
        if call.u and t < call.tokens:
            s = bias + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
            store_lanes(kind, call.u + out + t * row, lanes, s * sigmoid(s))
        if call.u_b and t >= BACK:
            s = bias_b + v3 * x0 + v2 * x1 + v1 * x2 + v0 * x3
            store_lanes(kind, call.u_b + out + (t - BACK) * row, lanes, s * sigmoid(s))
        x0, x1, x2 = x1, x2, x3


@compiled
def forward(kind, calls, packed, begin, end):
    """Run the tasks of a range."""
    call = calls[0]
    mode = flush_subnormals()
    steps = call.tokens + BACK if call.u_b else call.tokens
    for task in range(begin, end):
        image, block = task // call.blocks, task % call.blocks
        _pack_weights(call, block, packed)
        for first in range(0, steps, STEPS):
            last = min(first + STEPS, steps)
            for c in range(block * BLOCK, min(call.channels, (block + 1) * BLOCK), LANES):
                x = call.x + image * call.x_image + c * call.size
                out = (image * call.tokens * call.channels + c) * call.size
                weights = packed + 4 * (c - block * BLOCK)
                _forward_steps(kind, call, x, out, call.channels - c, weights, first, last)
    restore_float_mode(mode)


@compiled
def _sum_gradient(kind, grad, lanes, s):
    """Gradient of a sum before SiLU, for that of the output at an address."""
    gate = sigmoid(s)
    return load_lanes(kind, grad, lanes) * (gate * (splat(1.0) + s * (splat(1.0) - gate)))


@compiled
def _backward_steps(kind, call, image, c, packed, kept, first, last):
    """Write dx of a vector for steps first to last, and add to the gradients of its weights.

    Names: w, v are the taps of the direction from the first token and of the other, a and b the gradients of their sums
    now and at the last three steps, dw and dv the gradients of the taps.
    """
    lanes = call.channels - c
    x = call.x + image * call.x_image + c * call.size
    grad = call.grad + image * call.grad_image + c * call.size
    grad_b = call.grad_b + image * call.grad_b_image + c * call.size
    dx, row = call.dx + image * call.dx_image + c * call.size, call.dx_token
    x0, x1, x2 = _tokens_before(kind, call, x, first, lanes)
    a1, a2, a3, b1, b2 = _five(kept, WIDTH)
    b3, sums = load(kept + 5 * WIDTH), kept + 2 * BACK * WIDTH
    dw0, dw1, dw2, dw3, db = _five(sums, WIDTH)
    dv0, dv1, dv2, dv3, db_b = _five(sums + SUMS * WIDTH, WIDTH)
    w0, w1, w2, w3, bias = _five(packed, ROW)
    v0, v1, v2, v3, bias_b = _five(packed + SUMS * ROW, ROW)
    for t in range(first, last):
        x3 = _token(kind, call, x, t, lanes)
        prefetch(x + (t + PREFETCHED) * call.x_token)
        a0, b0 = splat(0.0), splat(0.0)
        if call.grad and t < call.tokens:
            prefetch(grad + (t + PREFETCHED) * call.grad_token)
            s = bias + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
            a0 = _sum_gradient(kind, grad + t * call.grad_token, lanes, s)
            dw0, dw1, dw2, dw3, db = dw0 + a0 * x0, dw1 + a0 * x1, dw2 + a0 * x2, dw3 + a0 * x3, db + a0
        if t >= BACK:
            if call.grad_b:
                prefetch(grad_b + (t + PREFETCHED) * call.grad_b_token)
                s = bias_b + v3 * x0 + v2 * x1 + v1 * x2 + v0 * x3
                b0 = _sum_gradient(kind, grad_b + (t - BACK) * call.grad_b_token, lanes, s)
                dv3, dv2, dv1, dv0, db_b = dv3 + b0 * x0, dv2 + b0 * x1, dv1 + b0 * x2, dv0 + b0 * x3, db_b + b0
            change = w0 * a0 + w1 * a1 + w2 * a2 + w3 * a3 + v3 * b0 + v2 * b1 + v1 * b2 + v0 * b3
            store_lanes(kind, dx + (t - BACK) * row, lanes, change)
        x0, x1, x2 = x1, x2, x3
        a1, a2, a3 = a0, a1, a2
        b1, b2, b3 = b0, b1, b2
    sums = _keep(kept, (a1, a2, a3, b1, b2, b3))
    _keep(sums, (dw0, dw1, dw2, dw3, db, dv0, dv1, dv2, dv3, db_b))


@compiled
def backward(kind, calls, scratch, begin, end):
    """Run the tasks of a range."""
    call = calls[0]
    mode = flush_subnormals()
    kept, steps = scratch + 2 * SUMS * ROW, call.tokens + BACK
    for task in range(begin, end):
        image, block = task // call.blocks, task % call.blocks
        vectors = min(VECTORS, (call.channels - block * BLOCK + LANES - 1) // LANES)
        _pack_weights(call, block, scratch)
        for at in range(kept, kept + VECTORS * KEPT * WIDTH, WIDTH):
            store(at, splat(0.0))
        for first in range(0, steps, STEPS):
            last = min(first + STEPS, steps)
            for vector in range(vectors):
                c = block * BLOCK + vector * LANES
                _backward_steps(
                    kind, call, image, c, scratch + vector * WIDTH, kept + vector * KEPT * WIDTH, first, last
                )
        for vector in range(vectors):
            sums = call.sums + (image * 2 * SUMS * call.lanes + block * BLOCK + vector * LANES) * 4
            for j in range(2 * SUMS):
                store(sums + j * call.lanes * 4, load(kept + (vector * KEPT + 2 * BACK + j) * WIDTH))
    restore_float_mode(mode)


@compiled
def sum_images(calls):
    """Write the gradients of weights and biases: the sums over images, in their order."""
    call = calls[0]
    mode = flush_subnormals()
    before = TAPS - call.taps
    for direction in range(2):
        dweight, dbias = call.dweight, call.dbias
        if direction == 1:
            dweight, dbias = call.dweight_b, call.dbias_b
        if dweight:
            for j in range(before, SUMS):
                for channel in range(call.channels):
                    total = load_float(call.sums + ((direction * SUMS + j) * call.lanes + channel) * 4)
                    for image in range(1, call.images):
                        row = (image * 2 + direction) * SUMS + j
                        total = total + load_float(call.sums + (row * call.lanes + channel) * 4)
                    at = dbias + channel * 4 if j == TAPS else dweight + (channel * call.taps + j - before) * 4
                    store_float(at, total)
    restore_float_mode(mode)
