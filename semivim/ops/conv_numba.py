"""The causal convolution with SiLU on a CPU: describes tensors to `conv_kernels_numba`, spreads them over threads.

The kernels take float32 or bfloat16; anything else is converted first.
"""

import numpy as np
import torch
from torch import Tensor

from . import conv_kernels_numba as kernels
from .launch_numba import dense_rows, filled
from .launch_numba import unavailable as unavailable
from .threads import aligned_scratch, run_tasks
from .vector_numba import BFLOAT16, FLOAT32, LANES


def ring_size(taps: int) -> int:
    """Return the smallest power of two that holds the taps."""
    return 1 << (taps - 1).bit_length()


def _dense(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


class _Call:
    """What a kernel is told of tensors, by field of its record, and the tensors whose addresses that holds."""

    def __init__(self, x: Tensor, weights: list[tuple[Tensor, Tensor]], reverse: list[bool]) -> None:
        self.dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        self.kind = BFLOAT16 if x.dtype == torch.bfloat16 else FLOAT32
        self.kept: list[Tensor] = []
        images, tokens, channels = x.shape
        taps, blocks = weights[0][0].shape[2], -(-channels // kernels.BLOCK)
        self.tasks = images * blocks
        self.fields = {
            "images": images,
            "tokens": tokens,
            "channels": channels,
            "lanes": -(-channels // LANES) * LANES,
            "blocks": blocks,
            "taps": taps,
            "ring": ring_size(taps),
            "size": self.dtype.itemsize,
        }
        for (weight, bias), back in zip(weights, reverse, strict=True):
            end = "_b" if back else ""
            self.point("weight" + end, _dense(weight))
            self.point("bias" + end, _dense(bias))
        self.describe("x", x)

    def point(self, name: str, x: Tensor) -> Tensor:
        """Give a field the address of a tensor."""
        self.kept.append(x)
        self.fields[name] = x.data_ptr()
        return x

    def describe(self, name: str, x: Tensor) -> None:
        """Give the fields of a tensor over tokens its address and strides."""
        x = self.point(name, dense_rows(x, self.dtype))
        image, token, _ = x.stride()
        self.fields[f"{name}_image"], self.fields[f"{name}_token"] = image * x.itemsize, token * x.itemsize

    def record(self) -> np.ndarray:
        return filled(kernels.CALL, **self.fields)


def forward(x: Tensor, weights: list[tuple[Tensor, Tensor]], reverse: list[bool]) -> list[Tensor]:
    """Return the output of each direction, contiguous ``(b, l, d)``."""
    call = _Call(x, weights, reverse)
    outputs = [call.point("u_b" if back else "u", torch.empty(x.shape, dtype=call.dtype)) for back in reverse]
    record, size = call.record(), kernels.weights_scratch(call.fields["taps"])

    def run(begin: int, end: int) -> None:
        memory, address = aligned_scratch(size)
        kernels.forward(call.kind, record, address, begin, end)
        del memory

    run_tasks(run, call.tasks)
    return [u.to(x.dtype) for u in outputs]


def backward(
    grads: list[Tensor], x: Tensor, weights: list[tuple[Tensor, Tensor]], reverse: list[bool]
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return the gradients of x and of each direction's weight and bias."""
    call = _Call(x, weights, reverse)
    taps = call.fields["taps"]
    gradients = []
    for grad, (weight, bias), back in zip(grads, weights, reverse, strict=True):
        end = "_b" if back else ""
        call.describe("grad" + end, grad)
        dweight = call.point("dweight" + end, torch.empty(weight.shape, dtype=torch.float32))
        dbias = call.point("dbias" + end, torch.empty(bias.shape, dtype=torch.float32))
        gradients.append((dweight, dbias))
    dx = call.point("dx", torch.empty(x.shape, dtype=call.dtype))
    call.point("sums", torch.empty(x.shape[0], 2, taps + 1, call.fields["lanes"]))
    record = call.record()
    size = kernels.weights_scratch(taps) + kernels.ring_scratch(call.fields["ring"])

    def run(begin: int, end: int) -> None:
        memory, address = aligned_scratch(size)
        kernels.backward(call.kind, record, address, begin, end)
        del memory

    run_tasks(run, call.tasks)
    kernels.sum_images(record)
    like_weights = [(dw.to(w.dtype), db.to(b.dtype)) for (dw, db), (w, b) in zip(gradients, weights, strict=True)]
    return dx.to(x.dtype), like_weights
