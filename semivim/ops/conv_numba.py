"""Both causal convolutions with SiLU on a CPU: describes tensors to `conv_kernels_numba`, spreads them over threads.

The kernels take float32 or bfloat16; anything else is converted first.
"""

import numpy as np
import torch
from torch import Tensor

from . import conv_kernels_numba as kernels
from .scan_numba import dense_rows, unavailable
from .threads import aligned_scratch, run_tasks
from .vector_numba import BFLOAT16, FLOAT32, LANES

__all__ = ["bidirectional_conv_backward", "bidirectional_conv_forward", "unavailable"]


def ring_size(taps: int) -> int:
    """Return the smallest power of two that holds the taps."""
    return 1 << (taps - 1).bit_length()


class _Launch:
    """A call's record, and the tensors whose addresses it holds."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor, weight_b: Tensor, bias_b: Tensor) -> None:
        self.dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        self.kind = BFLOAT16 if x.dtype == torch.bfloat16 else FLOAT32
        self.kept: list[Tensor] = []
        self.call = np.zeros(1, kernels.CALL)
        images, tokens, channels = x.shape
        self.taps, lanes = weight.shape[2], -(-channels // LANES) * LANES
        blocks = -(-channels // kernels.BLOCK)
        sizes = {"tokens": tokens, "channels": channels, "lanes": lanes, "blocks": blocks, "taps": self.taps}
        for field, value in {**sizes, "ring": ring_size(self.taps), "size": self.dtype.itemsize}.items():
            self.call[field] = value
        self.tasks = images * blocks
        weights = weight.new_zeros(2, self.taps + 1, lanes, dtype=torch.float32)
        for k, (taps, offset) in enumerate(((weight, bias), (weight_b, bias_b))):
            weights[k, :-1, :channels] = taps[:, 0].t()
            weights[k, -1, :channels] = offset
        self._address("weights", weights)
        self.describe("x", x)

    def _address(self, name: str, x: Tensor) -> None:
        self.kept.append(x)
        self.call[name] = x.data_ptr()

    def describe(self, name: str, x: Tensor) -> None:
        x = dense_rows(x, self.dtype)
        self._address(name, x)
        self.call[f"{name}_image"], self.call[f"{name}_token"] = (x.stride(k) * x.itemsize for k in (0, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, u_b = torch.empty(x.shape, dtype=self.dtype), torch.empty(x.shape, dtype=self.dtype)
        self.describe("u", u)
        self.describe("u_b", u_b)
        run_tasks(lambda begin, end: kernels.forward(self.kind, self.call, begin, end), self.tasks)
        return u.to(x.dtype), u_b.to(x.dtype)

    def backward(self, grad: Tensor, grad_b: Tensor) -> tuple[Tensor, Tensor]:
        """Return dx and the gradients of weights and biases, ``(2, k + 1, d)``."""
        images, _, channels = grad.shape
        self.describe("grad", grad)
        self.describe("grad_b", grad_b)
        dx = torch.empty(grad.shape, dtype=self.dtype)
        self._address("dx", dx)
        dweights = torch.zeros(images, 2, self.taps + 1, int(self.call["lanes"][0]))
        self._address("dweights", dweights)
        ring_bytes = kernels.backward_scratch(int(self.call["ring"][0]))

        def run(begin: int, end: int) -> None:
            memory, address = aligned_scratch(ring_bytes)
            kernels.backward(self.kind, self.call, address, begin, end)
            del memory

        run_tasks(run, self.tasks)
        return dx, dweights.sum(0)[:, :, :channels]


def bidirectional_conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor, weight_b: Tensor, bias_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Return u and u_b, contiguous ``(b, l, d)``."""
    return _Launch(x, weight, bias, weight_b, bias_b).forward(x)


def bidirectional_conv_backward(
    grad: Tensor, grad_b: Tensor, x: Tensor, weight: Tensor, bias: Tensor, weight_b: Tensor, bias_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, bias, weight_b, bias_b for those of u and u_b."""
    dx, dweights = _Launch(x, weight, bias, weight_b, bias_b).backward(grad, grad_b)
    gradients = [dx.to(x.dtype)]
    for of_direction, taps, offset in zip(dweights, (weight, weight_b), (bias, bias_b), strict=True):
        dtaps = of_direction[:-1].t().unsqueeze(1)
        gradients += [dtaps.to(taps.dtype, copy=True).contiguous(), of_direction[-1].to(offset.dtype, copy=True)]
    return tuple(gradients)  # type: ignore[return-value]
