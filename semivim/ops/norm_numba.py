"""RMS norm on a CPU: describes tensors to `norm_kernels_numba`, spreads blocks of rows over threads.

One pass over a row each way, where torch takes four operations and keeps what they computed. The kernels take float32.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import norm_kernels_numba as kernels
from .launch_numba import Fields, Layout, dense_float, float_bits, records
from .launch_numba import unavailable as unavailable
from .threads import run_tasks
from .vector_numba import LANES

_CALL = Layout(kernels.CALL)


def _fields(x: Tensor, channels: int) -> Fields:
    """Return the fields of the sizes."""
    return Fields(_CALL, x.numel() // channels, channels, -(-channels // LANES) * LANES)


def _run(kernel: Callable[..., None], fields: Fields) -> None:
    """Run a kernel's tasks."""
    call = records(_CALL, fields)
    run_tasks(lambda begin, end: kernel(call, begin, end), -(-fields["rows"] // kernels.ROWS))


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normalised rows and the factor of each, as `norm_reference` does."""
    x = dense_float(x)
    fields = _fields(x, weight.numel())
    y, scales = torch.empty_like(x), torch.empty(fields["rows"], dtype=torch.float32)
    fields.point_dense("x", x, weight)
    fields.point("y", y, scales)
    fields["eps"] = float_bits(eps)
    _run(kernels.forward, fields)
    return y, scales


def backward(grad: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the weight."""
    x = dense_float(x)
    fields = _fields(x, weight.numel())
    tasks = -(-fields["rows"] // kernels.ROWS)
    dx, dweights = torch.empty_like(x), torch.zeros(tasks, fields["lanes"], dtype=torch.float32)
    fields.point_dense("x", x, weight)
    fields.point_dense("scales", scales, grad)  # hooks on saved tensors may have changed the scales
    fields.point("dx", dx, dweights)
    _run(kernels.backward, fields)
    dweight = dweights.sum(0) if tasks > 1 else dweights[0]
    return dx, dweight[: weight.numel()]
