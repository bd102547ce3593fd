# mypy: ignore-errors
"""RMS norm on a CPU: one pass over a row each way, where torch takes four operations and keeps what they computed.

Sixteen channels are in the lanes of a vector. A task is a block of rows; the gradient of the weight is summed over the
rows of a block, then over blocks in their order. The kernels take float32; anything else is converted first.
"""

import numpy as np
import torch
from torch import Tensor

from .eager import cast
from .launch_numba import Fields, Layout, dense_float, float_bits, records
from .launch_numba import unavailable as unavailable
from .subnormals_numba import flush_subnormals, restore_float_mode
from .threads import run_tasks
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
_CALL = Layout(CALL)


@compiled
def _forward(calls, begin, end):
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
def _backward(calls, begin, end):
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
                of_weight = g * load_lanes(FLOAT32, x + 4 * c, channels - c)
                sums = sums + of_weight * load_lanes(FLOAT32, call.weight + 4 * c, channels - c)
                accumulate(dweights + 4 * c, of_weight * splat(scale))
            along = splat(sum_lanes(sums) / channels * scale * scale)
            for c in range(0, channels, LANES):
                g = load_lanes(FLOAT32, grad + 4 * c, channels - c)
                g = g * load_lanes(FLOAT32, call.weight + 4 * c, channels - c)
                v = (g - load_lanes(FLOAT32, x + 4 * c, channels - c) * along) * splat(scale)
                store_lanes(FLOAT32, dx + 4 * c, channels - c, v)
    restore_float_mode(mode)


def _fields(x: Tensor, weight: Tensor) -> Fields:
    """Return the fields that both passes need."""
    channels = weight.numel()
    fields = Fields(_CALL, rows=x.numel() // channels, channels=channels, lanes=-(-channels // LANES) * LANES)
    fields.point("x", dense_float(x))
    fields.point("weight", dense_float(weight))
    return fields


def _run(kernel, fields: Fields) -> None:
    call = records(_CALL, fields)
    run_tasks(lambda begin, end: kernel(call, begin, end), -(-fields["rows"] // ROWS))


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normalised rows and the factor of each, as `norm_reference` does."""
    fields = _fields(x, weight)
    y = fields.point("y", torch.empty(*x.shape, dtype=torch.float32))
    fields["eps"] = float_bits(eps)
    scales = fields.point("scales", torch.empty(fields["rows"], dtype=torch.float32))
    _run(_forward, fields)
    return cast(y, x.dtype), scales


def backward(grad: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the weight."""
    fields = _fields(x, weight)
    fields.point("grad", dense_float(grad))
    fields.point("scales", scales)
    dx = fields.point("dx", torch.empty(*x.shape, dtype=torch.float32))
    tasks = -(-fields["rows"] // ROWS)
    dweights = fields.point("dweights", torch.zeros(tasks, fields["lanes"], dtype=torch.float32))
    _run(_backward, fields)
    dweight = dweights.sum(0) if tasks > 1 else dweights[0]
    return cast(dx, x.dtype), cast(dweight[: weight.numel()], weight.dtype)
