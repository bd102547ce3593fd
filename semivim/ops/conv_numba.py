"""The causal convolution with SiLU on a CPU: describes tensors to `conv_kernels_numba`, spreads them over threads.

The kernels take float32 or bfloat16; anything else is converted first. They keep four taps in registers, as many as any
released model has; `conv_reference` takes more.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from . import conv_kernels_numba as kernels
from . import conv_reference
from .eager import cast, deliver
from .launch_numba import Fields, Layout, records
from .launch_numba import unavailable as unavailable
from .threads import run_tasks, scratch
from .vector_numba import BFLOAT16, FLOAT32, LANES

_CALL = Layout(kernels.CALL)


def _fields(x: Tensor, weights: list[tuple[Tensor, Tensor]], reverse: list[bool], dtype: torch.dtype) -> Fields:
    """Return the fields that both passes need."""
    images, tokens, channels = x.shape
    taps = weights[0][0].shape[2]
    lanes, blocks = -(-channels // LANES) * LANES, -(-channels // kernels.BLOCK)
    fields = Fields(_CALL, images, tokens, channels, lanes, blocks, taps, dtype.itemsize)
    for (weight, bias), back in zip(weights, reverse, strict=True):
        end = "_b" if back else ""
        fields.point_dense("weight" + end, weight, bias)
    fields.describe("x", dtype, x)
    return fields


def _run(kernel: Callable[..., None], fields: Fields, scratch_bytes: int) -> np.ndarray:
    """Run a kernel's tasks, each thread with its own scratch; return the record."""
    call, kind = records(_CALL, fields), BFLOAT16 if fields["size"] == 2 else FLOAT32

    def run_range(begin: int, end: int) -> None:
        kernel(kind, call, scratch(scratch_bytes), begin, end)

    run_tasks(run_range, fields["images"] * fields["blocks"])
    return call


def _kernel_dtype(x: Tensor) -> torch.dtype:
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32


def forward(x: Tensor, weights: list[tuple[Tensor, Tensor]], reverse: list[bool]) -> list[Tensor]:
    """Return the output of each direction, contiguous ``(b, l, d)``."""
    if weights[0][0].shape[2] > kernels.TAPS:
        return conv_reference.forward(x, weights, reverse)
    dtype = _kernel_dtype(x)
    fields = _fields(x, weights, reverse, dtype)
    shape = fields["images"], fields["tokens"], fields["channels"]
    outputs = [torch.empty(*shape, dtype=dtype) for _ in reverse]
    for u, back in zip(outputs, reverse, strict=True):
        fields.point("u_b" if back else "u", u)
    _run(kernels.forward, fields, kernels.forward_scratch())
    return [cast(u, x.dtype) for u in outputs]


def backward(
    grads: list[Tensor],
    x: Tensor,
    weights: list[tuple[Tensor, Tensor]],
    reverse: list[bool],
    dx: Tensor | None = None,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return the gradients of x and of each direction's weight and bias."""
    if weights[0][0].shape[2] > kernels.TAPS:
        return conv_reference.backward(grads, x, weights, reverse, dx)
    dtype = _kernel_dtype(x)
    fields = _fields(x, weights, reverse, dtype)
    gradients = []
    for grad, (weight, bias), back in zip(grads, weights, reverse, strict=True):
        end = "_b" if back else ""
        fields.describe("grad" + end, dtype, grad)
        dweight = torch.empty(*weight.shape, dtype=torch.float32)
        dbias = torch.empty(*bias.shape, dtype=torch.float32)
        fields.point("dweight" + end, dweight, dbias)
        gradients.append((dweight, dbias))
    of_x = torch.empty(*x.shape, dtype=dtype) if dx is None or dx.dtype is not dtype else dx
    fields.describe("dx", dtype, of_x)
    fields.point("sums", torch.empty(x.shape[0], 2, kernels.SUMS, fields["lanes"], dtype=torch.float32))
    call = _run(kernels.backward, fields, kernels.backward_scratch())
    kernels.sum_images(call)
    like_weights = [(cast(dw, w.dtype), cast(db, b.dtype)) for (dw, db), (w, b) in zip(gradients, weights, strict=True)]
    return deliver(of_x, x.dtype, dx), like_weights
