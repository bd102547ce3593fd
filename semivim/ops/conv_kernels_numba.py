# mypy: ignore-errors
"""Kernels of the causal convolution with SiLU in one or both directions, rows read where they lie.

Sixteen channels are in the lanes of a vector. A task is one image and one block of channels. The backward walks the
tokens once: it keeps the gradients of the last k sums in a ring and recomputes the sums. Gradients of weights and
biases are summed over tokens per image, then over images in their order.
"""

from .subnormals_numba import flush_subnormals, restore_float_mode
from .vector_numba import (
    LANES,
    SOURCE,
    WIDTH,
    accumulate,
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

VECTORS = 4  # vectors of channels in a task
PREFETCHED = 24  # tokens ahead of the one in use; rows lie too far apart for a processor to guess them
BLOCK = VECTORS * LANES

# Addresses and strides in bytes. Where a direction is absent its weight (channels, 1, taps), bias, u, grad and
# gradients are 0; weights, biases and their gradients are dense float32. `sums` holds float32 sums over tokens, by
# image, direction and tap, the bias last: (images, 2, taps + 1, lanes). `ring` is a power of two that holds k tokens.
CALL = record(
    *("images", "tokens", "channels", "lanes", "blocks", "taps", "ring", "size", "dx", "sums", SOURCE),
    *(f"{name}{part}" for name in ("x", "grad", "grad_b") for part in ("", "_image", "_token")),
    *(f"{name}{end}" for end in ("", "_b") for name in ("weight", "bias", "u", "dweight", "dbias")),
)


def weights_scratch(taps: int) -> int:
    """Bytes in which a task keeps the weights of its channels, the taps and last the bias of each direction."""
    return 2 * (taps + 1) * BLOCK * 4


def ring_scratch(ring: int) -> int:
    """Bytes of the rings of a task's backward."""
    return 2 * ring * VECTORS * WIDTH


@compiled
def _pack_weights(call, block, packed):
    """Copy the weights of a block's channels to lanes, zeros for channels and directions that do not exist."""
    for direction in range(2):
        weight, bias = call.weight, call.bias
        if direction == 1:
            weight, bias = call.weight_b, call.bias_b
        at = packed + direction * (call.taps + 1) * BLOCK * 4
        for lane in range(BLOCK):
            channel = block * BLOCK + lane
            exists = weight != 0 and channel < call.channels
            for j in range(call.taps):
                tap = load_float(weight + (channel * call.taps + j) * 4) if exists else 0.0
                store_float(at + (j * BLOCK + lane) * 4, tap)
            store_float(at + (call.taps * BLOCK + lane) * 4, load_float(bias + channel * 4) if exists else 0.0)


@compiled
def _sum(kind, call, x, token, lanes, weights, reverse):
    """One direction's sum before SiLU at one token; x and weights are at the task's image and channels."""
    last = call.taps - 1
    total = load(weights + call.taps * BLOCK * 4)
    step, missing = call.x_token, last - token
    if reverse:
        step, missing = -call.x_token, token + last - call.tokens + 1
    first = x + token * call.x_token - last * step
    for j in range(max(0, missing), call.taps):
        total = total + load(weights + j * BLOCK * 4) * load_lanes(kind, first + j * step, lanes)
    return total


@compiled
def forward(kind, calls, packed, begin, end):
    """Run the tasks of a range."""
    call = calls[0]
    mode = flush_subnormals()
    for task in range(begin, end):
        image, block = task // call.blocks, task % call.blocks
        _pack_weights(call, block, packed)
        for token in range(call.tokens):
            for c in range(block * BLOCK, min(call.channels, (block + 1) * BLOCK), LANES):
                lanes = call.channels - c
                x = call.x + image * call.x_image + c * call.size
                prefetch(x + (token + PREFETCHED) * call.x_token)
                weights = packed + 4 * (c - block * BLOCK)
                out = ((image * call.tokens + token) * call.channels + c) * call.size
                if call.u:
                    s = _sum(kind, call, x, token, lanes, weights, False)
                    store_lanes(kind, call.u + out, lanes, s * sigmoid(s))
                if call.u_b:
                    s = _sum(kind, call, x, token, lanes, weights + (call.taps + 1) * BLOCK * 4, True)
                    store_lanes(kind, call.u_b + out, lanes, s * sigmoid(s))
    restore_float_mode(mode)


@compiled
def _sum_backward(kind, call, x, grad, token, lanes, weights, sums, reverse):
    """Gradient of one direction's sum at one token; adds to those of its taps and bias."""
    s = _sum(kind, call, x, token, lanes, weights, reverse)
    gate = sigmoid(s)
    ds = load_lanes(kind, grad, lanes) * (gate * (splat(1.0) + s * (splat(1.0) - gate)))
    last = call.taps - 1
    step, missing = call.x_token, last - token
    if reverse:
        step, missing = -call.x_token, token + last - call.tokens + 1
    first = x + token * call.x_token - last * step
    for j in range(max(0, missing), call.taps):
        accumulate(sums + j * call.lanes * 4, ds * load_lanes(kind, first + j * step, lanes))
    accumulate(sums + call.taps * call.lanes * 4, ds)
    return ds


@compiled
def _backward_token(kind, call, image, c, step, weights, ring):
    """Take sum `step` of the causal direction and `step - k + 1` of the other; write dx of the latter token."""
    last, lanes = call.taps - 1, call.channels - c
    token = step - last
    to_other = (call.taps + 1) * BLOCK * 4
    to_other_sums = (call.taps + 1) * call.lanes * 4
    x = call.x + image * call.x_image + c * call.size
    sums = call.sums + 4 * c + image * 2 * to_other_sums
    ring_b, wrap = ring + call.ring * WIDTH, call.ring - 1
    ds = splat(0.0)
    if call.grad and step < call.tokens:
        grad = call.grad + image * call.grad_image + step * call.grad_token + c * call.size
        ds = _sum_backward(kind, call, x, grad, step, lanes, weights, sums, False)
    store(ring + (step & wrap) * WIDTH, ds)
    if token < 0:
        return
    ds = splat(0.0)
    if call.grad_b:
        grad = call.grad_b + image * call.grad_b_image + token * call.grad_b_token + c * call.size
        ds = _sum_backward(kind, call, x, grad, token, lanes, weights + to_other, sums + to_other_sums, True)
    store(ring_b + (token & wrap) * WIDTH, ds)
    dx = splat(0.0)
    for j in range(call.taps):
        tap = weights + j * BLOCK * 4
        dx = dx + load(tap) * load(ring + ((step - j) & wrap) * WIDTH)
        dx = dx + load(tap + to_other) * load(ring_b + ((token - last + j) & wrap) * WIDTH)
    at = call.dx + ((image * call.tokens + token) * call.channels + c) * call.size
    store_lanes(kind, at, lanes, dx)


@compiled
def backward(kind, calls, scratch, begin, end):
    """Run the tasks of a range."""
    call = calls[0]
    mode = flush_subnormals()
    rings = scratch + 2 * (call.taps + 1) * BLOCK * 4
    for task in range(begin, end):
        image, block = task // call.blocks, task % call.blocks
        _pack_weights(call, block, scratch)
        for at in range(rings, rings + 2 * call.ring * VECTORS * WIDTH, WIDTH):
            store(at, splat(0.0))
        for vector in range(VECTORS):
            c = block * BLOCK + vector * LANES
            if c < call.channels:
                for row in range(2 * (call.taps + 1)):
                    store(call.sums + ((image * 2 * (call.taps + 1) + row) * call.lanes + c) * 4, splat(0.0))
        for step in range(call.tokens + call.taps - 1):
            for vector in range(VECTORS):
                c = block * BLOCK + vector * LANES
                if c < call.channels:
                    weights = scratch + vector * WIDTH
                    _backward_token(kind, call, image, c, step, weights, rings + 2 * call.ring * vector * WIDTH)
    restore_float_mode(mode)


@compiled
def sum_images(calls):
    """Write the gradients of weights and biases: the sums over images, in their order."""
    call = calls[0]
    mode = flush_subnormals()
    for direction in range(2):
        dweight, dbias = call.dweight, call.dbias
        if direction == 1:
            dweight, dbias = call.dweight_b, call.dbias_b
        if dweight:
            for j in range(call.taps + 1):
                for channel in range(call.channels):
                    total = load_float(call.sums + ((direction * (call.taps + 1) + j) * call.lanes + channel) * 4)
                    for image in range(1, call.images):
                        row = (image * 2 + direction) * (call.taps + 1) + j
                        total = total + load_float(call.sums + (row * call.lanes + channel) * 4)
                    at = dbias + channel * 4 if j == call.taps else dweight + (channel * call.taps + j) * 4
                    store_float(at, total)
    restore_float_mode(mode)
