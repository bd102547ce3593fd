"""The causal convolution with SiLU on a CPU: describes tensors to `conv_kernels_numba`, spreads them over threads.

The kernels take float32 or bfloat16; anything else is converted first.
"""

import numpy as np
import torch
from torch import Tensor

from . import conv_kernels_numba as kernels
from .launch_numba import dense_rows
from .launch_numba import unavailable as unavailable
from .threads import aligned_scratch, run_tasks
from .vector_numba import BFLOAT16, FLOAT32, LANES


def ring_size(taps: int) -> int:
    """Return the smallest power of two that holds the taps."""
    return 1 << (taps - 1).bit_length()


class _Launch:
    """A call's record, and the tensors whose addresses it holds."""

    def __init__(self, x: Tensor, weights: list[tuple[Tensor, Tensor]], reverse: list[bool]) -> None:
        self.dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        self.kind = BFLOAT16 if x.dtype == torch.bfloat16 else FLOAT32
        self.kept: list[Tensor] = []
        self.call = np.zeros(1, kernels.CALL)
        self.x, self.reverse = x, reverse
        images, tokens, channels = x.shape
        self.taps, lanes = weights[0][0].shape[2], -(-channels // LANES) * LANES
        blocks = -(-channels // kernels.BLOCK)
        sizes = {"tokens": tokens, "channels": channels, "lanes": lanes, "blocks": blocks, "taps": self.taps}
        for field, value in {**sizes, "ring": ring_size(self.taps), "size": self.dtype.itemsize}.items():
            self.call[field] = value
        self.tasks = images * blocks
        rows = x.new_zeros(2, self.taps + 1, lanes, dtype=torch.float32)
        for (weight, bias), back in zip(weights, reverse, strict=True):
            rows[int(back), :-1, :channels] = weight[:, 0].t()
            rows[int(back), -1, :channels] = bias
        self._address("weights", rows)
        self._describe("x", x)

    def _address(self, name: str, x: Tensor) -> None:
        self.kept.append(x)
        self.call[name] = x.data_ptr()

    def _describe(self, name: str, x: Tensor) -> None:
        x = dense_rows(x, self.dtype)
        self._address(name, x)
        self.call[f"{name}_image"], self.call[f"{name}_token"] = (x.stride(k) * x.itemsize for k in (0, 1))

    def forward(self) -> list[Tensor]:
        outputs = [torch.empty(self.x.shape, dtype=self.dtype) for _ in self.reverse]
        for u, back in zip(outputs, self.reverse, strict=True):
            self._address("u_b" if back else "u", u)
        run_tasks(lambda begin, end: kernels.forward(self.kind, self.call, begin, end), self.tasks)
        return [u.to(self.x.dtype) for u in outputs]

    def backward(self, grads: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return dx and the gradients of weights and biases, ``(2, k + 1, d)``, by causal and anti-causal direction."""
        images, _, channels = self.x.shape
        for grad, back in zip(grads, self.reverse, strict=True):
            self._describe("grad_b" if back else "grad", grad)
        dx = torch.empty(self.x.shape, dtype=self.dtype)
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


def forward(x: Tensor, weights: list[tuple[Tensor, Tensor]], reverse: list[bool]) -> list[Tensor]:
    """Return the output of each direction, contiguous ``(b, l, d)``."""
    return _Launch(x, weights, reverse).forward()


def backward(
    grads: list[Tensor], x: Tensor, weights: list[tuple[Tensor, Tensor]], reverse: list[bool]
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return the gradients of x and of each direction's weight and bias."""
    dx, dweights = _Launch(x, weights, reverse).backward(grads)
    gradients = []
    for (weight, bias), back in zip(weights, reverse, strict=True):
        dtaps, dbias = dweights[int(back), :-1].t().unsqueeze(1), dweights[int(back), -1]
        gradients.append((dtaps.to(weight.dtype, copy=True).contiguous(), dbias.to(bias.dtype, copy=True)))
    return dx.to(x.dtype), gradients
