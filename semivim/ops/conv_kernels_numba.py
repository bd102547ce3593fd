# mypy: ignore-errors
"""Kernels of the causal convolution with SiLU in one or both directions, rows read where they lie.

Sixteen channels are in the lanes of a vector. A task is one image and one block of channels. The backward walks the
tokens once: it keeps the gradients of the last k sums in a ring and recomputes the sums. Gradients of weights and
biases are summed over tokens per image.
"""

from .vector_numba import (
    LANES,
    SOURCE,
    WIDTH,
    accumulate,
    compiled,
    load,
    load_lanes,
    prefetch,
    record,
    sigmoid,
    splat,
    store,
    store_lanes,
)

GROUPS = 4  # vectors of channels in a task
AHEAD = 24  # tokens; rows lie too far apart for a processor to guess them
BLOCK = GROUPS * LANES

# Addresses and strides in bytes; u and grad are 0 where the causal direction is absent, u_b and grad_b where the other
# one is. `weights` holds float32 (2, k + 1, lanes): for each direction the taps and, last, the
# bias; `dweights` the same per image. `ring` is a power of two that holds k tokens.
CALL = record(
    *("tokens", "channels", "lanes", "blocks", "taps", "ring", "size", "weights", "dweights", "dx", SOURCE),
    *(f"{name}{part}" for name in ("x", "grad", "grad_b") for part in ("", "_image", "_token")),
    *("u", "u_b"),
)


@compiled
def _sum(kind, call, x, token, lanes, weights, back):
    """One direction's sum before SiLU at one token; x and weights are at the task's image and channels."""
    last = call.taps - 1
    total = load(weights + call.taps * call.lanes * 4)
    step, missing = call.x_token, last - token
    if back:
        step, missing = -call.x_token, token + last - call.tokens + 1
    first = x + token * call.x_token - last * step
    for j in range(max(0, missing), call.taps):
        total = total + load(weights + j * call.lanes * 4) * load_lanes(kind, first + j * step, lanes)
    return total


@compiled
def forward(kind, calls, begin, end):
    """Run the tasks of a range."""
    call = calls[0]
    for task in range(begin, end):
        image, block = task // call.blocks, task % call.blocks
        for token in range(call.tokens):
            for c in range(block * BLOCK, min(call.channels, (block + 1) * BLOCK), LANES):
                lanes = call.channels - c
                x = call.x + image * call.x_image + c * call.size
                prefetch(x + (token + AHEAD) * call.x_token)
                ahead = call.weights + 4 * c
                out = ((image * call.tokens + token) * call.channels + c) * call.size
                if call.u:
                    s = _sum(kind, call, x, token, lanes, ahead, False)
                    store_lanes(kind, call.u + out, lanes, s * sigmoid(s))
                if call.u_b:
                    s = _sum(kind, call, x, token, lanes, ahead + (call.taps + 1) * call.lanes * 4, True)
                    store_lanes(kind, call.u_b + out, lanes, s * sigmoid(s))


@compiled
def _into_sum(kind, call, x, grad, token, lanes, weights, dweights, back):
    """Gradient of one direction's sum at one token; adds to those of its taps and bias."""
    s = _sum(kind, call, x, token, lanes, weights, back)
    gate = sigmoid(s)
    ds = load_lanes(kind, grad, lanes) * (gate * (splat(1.0) + s * (splat(1.0) - gate)))
    last = call.taps - 1
    step, missing = call.x_token, last - token
    if back:
        step, missing = -call.x_token, token + last - call.tokens + 1
    first = x + token * call.x_token - last * step
    for j in range(max(0, missing), call.taps):
        accumulate(dweights + j * call.lanes * 4, ds * load_lanes(kind, first + j * step, lanes))
    accumulate(dweights + call.taps * call.lanes * 4, ds)
    return ds


@compiled
def _backward_token(kind, call, image, c, now, ring):
    """Enter sum `now` of the causal direction and `now - k + 1` of the other; write dx of the latter token."""
    last, lanes = call.taps - 1, call.channels - c
    token = now - last
    direction = (call.taps + 1) * call.lanes * 4
    x = call.x + image * call.x_image + c * call.size
    weights, dweights = call.weights + 4 * c, call.dweights + 4 * c + image * 2 * direction
    ring_b, wrap = ring + call.ring * WIDTH, call.ring - 1
    ds = splat(0.0)
    if call.grad and now < call.tokens:
        grad = call.grad + image * call.grad_image + now * call.grad_token + c * call.size
        ds = _into_sum(kind, call, x, grad, now, lanes, weights, dweights, False)
    store(ring + (now & wrap) * WIDTH, ds)
    if token < 0:
        return
    ds = splat(0.0)
    if call.grad_b:
        grad = call.grad_b + image * call.grad_b_image + token * call.grad_b_token + c * call.size
        ds = _into_sum(kind, call, x, grad, token, lanes, weights + direction, dweights + direction, True)
    store(ring_b + (token & wrap) * WIDTH, ds)
    dx = splat(0.0)
    for j in range(call.taps):
        tap = weights + j * call.lanes * 4
        dx = dx + load(tap) * load(ring + ((now - j) & wrap) * WIDTH)
        dx = dx + load(tap + direction) * load(ring_b + ((token - last + j) & wrap) * WIDTH)
    at = call.dx + ((image * call.tokens + token) * call.channels + c) * call.size
    store_lanes(kind, at, lanes, dx)


@compiled
def backward(kind, calls, scratch, begin, end):
    """Run the tasks of a range; dweights is zero before."""
    call = calls[0]
    for task in range(begin, end):
        image, block = task // call.blocks, task % call.blocks
        for at in range(scratch, scratch + 2 * call.ring * GROUPS * WIDTH, WIDTH):
            store(at, splat(0.0))
        for now in range(call.tokens + call.taps - 1):
            for group in range(GROUPS):
                c = block * BLOCK + group * LANES
                if c < call.channels:
                    _backward_token(kind, call, image, c, now, scratch + 2 * call.ring * group * WIDTH)


def backward_scratch(ring: int) -> int:
    """Bytes of a thread's scratch in the backward."""
    return 2 * ring * GROUPS * WIDTH
