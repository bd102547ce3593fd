# mypy: ignore-errors
"""Kernels of RMS norm on a CPU: one pass over a row each way.

Sixteen channels are in the lanes of a vector. A task is a block of rows; the gradient of the weight is summed over the
rows of a block. The kernels take float32.
"""

import numpy as np

from .subnormals_numba import flush_subnormals, restore_float_mode
from .vector_numba import (
    FLOAT32,
    LANES,
    SOURCE,
    accumulate,
    compiled,
    load_float,
    load_lanes,
    record,
    splat,
    store_float,
    store_lanes,
    sum_lanes,
)

ROWS = 64  # of a task

# Addresses of contiguous float32 tensors: x, y, grad and dx (rows, channels), scales (rows,), weight (channels,),
# dweights (tasks, lanes).
CALL = record(
    *("rows", "channels", "lanes", "x", "weight", "y", "scales", "grad", "dx", "dweights", SOURCE),
    eps=np.float64,
)


@compiled
def forward(calls, begin, end):
    """Normalise the rows of a range of tasks."""
    call = calls[0]
    mode = flush_subnormals()
    channels, row = call.channels, call.channels * 4
    for i in range(begin * ROWS, min(end * ROWS, call.rows)):
        x, y, squares = call.x + i * row, call.y + i * row, splat(0.0)
        for c in range(0, channels, LANES):
            v = load_lanes(FLOAT32, x + 4 * c, channels - c)
            squares = squares + v * v
        scale = np.float32(1.0 / np.sqrt(sum_lanes(squares) / channels + call.eps))
        store_float(call.scales + 4 * i, scale)
        for c in range(0, channels, LANES):
            v = load_lanes(FLOAT32, x + 4 * c, channels - c) * splat(scale)
            store_lanes(FLOAT32, y + 4 * c, channels - c, v * load_lanes(FLOAT32, call.weight + 4 * c, channels - c))
    restore_float_mode(mode)


@compiled
def backward(calls, begin, end):
    """Gradients of the rows of a range of tasks, and of the weight summed over the rows of each task."""
    call = calls[0]
    mode = flush_subnormals()
    channels, row = call.channels, call.channels * 4
    for task in range(begin, end):
        dweights = call.dweights + task * call.lanes * 4
        for i in range(task * ROWS, min((task + 1) * ROWS, call.rows)):
            x, grad, dx, sums = call.x + i * row, call.grad + i * row, call.dx + i * row, splat(0.0)
            scale = load_float(call.scales + 4 * i)
            for c in range(0, channels, LANES):
                g = load_lanes(FLOAT32, grad + 4 * c, channels - c)
                of_weight = g * (load_lanes(FLOAT32, x + 4 * c, channels - c) * splat(scale))
                sums = sums + of_weight * load_lanes(FLOAT32, call.weight + 4 * c, channels - c)
                accumulate(dweights + 4 * c, of_weight)
            along = splat(sum_lanes(sums) / channels * scale)
            for c in range(0, channels, LANES):
                g = load_lanes(FLOAT32, grad + 4 * c, channels - c)
                g = g * load_lanes(FLOAT32, call.weight + 4 * c, channels - c)
                v = (g - load_lanes(FLOAT32, x + 4 * c, channels - c) * along) * splat(scale)
                store_lanes(FLOAT32, dx + 4 * c, channels - c, v)
    restore_float_mode(mode)
