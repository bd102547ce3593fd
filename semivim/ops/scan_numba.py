"""The selective scan on a CPU: describes tensors to the kernels, spreads their tasks over threads.

The kernels take float32 or, where all tensors over tokens have it, bfloat16; anything else is converted first.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from . import scan_adjoint_numba as adjoint
from . import scan_kernels_numba as kernels
from . import scan_one_state_numba as one_state
from .eager import cast, deliver
from .launch_numba import Fields, Layout, float_bits, records
from .launch_numba import unavailable as unavailable
from .scan_reference import Direction, direction_of, operands_of
from .threads import run_tasks, scratch
from .vector_numba import BFLOAT16, FLOAT32, LANES

_CALL, _DIRECTION, _PLACE = (Layout(kind) for kind in (kernels.CALL, kernels.DIRECTION, kernels.PLACE))


@functools.cache
def _scratch_size(sizes: Callable[[int, int], dict[str, int]], blocks: int, padded: int) -> int:
    """Return the bytes of a thread's scratch for some blocks."""
    return sum(sizes(blocks, padded).values())


@functools.lru_cache
def _place(sizes: Callable[[int, int], dict[str, int]], blocks: int, padded: int, address: int) -> np.ndarray:
    """Return the place of a thread whose scratch is at an address; no other thread has one there."""
    place = Fields(_PLACE)
    for field, size in sizes(blocks, padded).items():
        place[field] = address
        address += size
    return records(_PLACE, place)


def _all_bfloat16(directions: list[Direction], z: Tensor | None) -> bool:
    """Return whether all tensors over tokens are bfloat16."""
    wanted = torch.bfloat16
    return all(f.u.dtype is f.delta.dtype is f.bc.dtype is wanted for f in directions) and (
        z is None or z.dtype is wanted
    )


class _Launch:
    """What the kernels are told of a call: the fields of their records."""

    def __init__(
        self, directions: list[Direction], z: Tensor | None, mix: Tensor | None, scale: float, softplus: bool
    ) -> None:
        self.u, self.n = directions[0].u, directions[0].A.shape[1]
        self.images, self.tokens, self.channels = self.u.shape
        self.padded = kernels.padded_states(self.n)
        self.blocks, self.lanes = -(-self.channels // kernels.BLOCK), -(-self.channels // LANES) * LANES
        self.dtype, self.kind = torch.float32, FLOAT32
        if _all_bfloat16(directions, z):
            self.dtype, self.kind = torch.bfloat16, BFLOAT16
        self.call = Fields(
            _CALL,
            *(self.images, self.tokens, self.channels, self.lanes, self.blocks, self.n, self.padded),
            *(len(directions), softplus, self.dtype.itemsize),
        )
        self.call["scale"] = float_bits(scale)
        self.call.point("rates", torch.empty(len(directions), self.padded, self.lanes, dtype=torch.float32))
        self.directions = []
        for f in directions:
            fields = Fields(_DIRECTION, f.reverse)
            fields.describe("u", self.dtype, f.u, f.delta, f.bc)
            fields.point_dense("A", f.A, f.D, f.delta_bias)
            self.directions.append(fields)
        if z is not None:
            self.call.describe("z", self.dtype, z)
        if mix is not None:
            self.call.point_dense("mix", mix)

    def _keep_total(self, result: Tensor) -> None:
        """Give the sums of the directions before the last one a place: the result's own where it holds float32."""
        if len(self.directions) > 1:
            wide = torch.float32
            self.call.describe("total", wide, result if self.dtype == wide else torch.empty(*result.shape, dtype=wide))

    def _run(
        self, kernel: Callable[..., None], scratch_sizes: Callable[[int, int], dict[str, int]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Run a kernel's tasks, each thread with its own scratch; return the records."""
        call, directions = records(_CALL, self.call), records(_DIRECTION, *self.directions)
        kernels.transpose_rates(call, directions)

        def run_range(begin: int, end: int) -> None:
            strip = scratch_sizes, min(self.blocks, end - begin), self.padded
            kernel(self.kind, call, directions, _place(*strip, scratch(_scratch_size(*strip))), begin, end)

        run_tasks(run_range, self.images * self.blocks)
        return call, directions

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the output and the states after each chunk."""
        shape = self.images, self.tokens, self.channels  # unpacked, sizes are read in half the time
        out = torch.empty(*shape, dtype=self.dtype)
        size = saved_size(self.tokens, self.channels, self.n, len(self.directions))
        states = torch.empty(self.images, size, dtype=torch.float32)
        self.call.point("out", out, states)
        self._keep_total(out)
        if self.call["mix"] and len(self.directions) > 1:
            self.call.point("mixed", torch.empty(*shape, dtype=torch.float32))
        of_n = one_state if self.n == 1 else kernels
        self._run(of_n.forward, of_n.forward_scratch)
        return cast(out, self.u.dtype), states

    def backward(self, grad: Tensor, states: Tensor, dz: Tensor | None) -> tuple[list[list[Tensor]], Tensor | None]:
        """Return the gradients of each direction's six operands and of z, that one in dz if it can hold it."""
        call, count = self.call, len(self.directions)
        shape = self.images, self.tokens, self.channels
        call.describe("grad", self.dtype, grad)
        call.point_dense("states", states)  # hooks on saved tensors may have changed it
        blocks = self.images, self.blocks, count, self.tokens
        # Sums over tokens per image, which the kernel adds to: those of A, then of D and of the bias of delta.
        per_image = torch.zeros(self.images * count, self.padded + 2, self.lanes, dtype=torch.float32)
        call.point("sums", torch.empty(*blocks, 2, self.padded, dtype=torch.float32), per_image)
        call["dD"] = call["dA"] + self.images * count * self.padded * self.lanes * per_image.itemsize
        call["dbias"] = call["dD"] + self.images * count * self.lanes * per_image.itemsize
        if call["z"]:
            if dz is None or dz.dtype is not self.dtype:
                dz = torch.empty(*shape, dtype=self.dtype)
            call.describe("dz", self.dtype, dz)
            self._keep_total(dz)
        gradients = []
        for fields in self.directions:
            of_direction = [
                torch.empty(*shape, dtype=self.dtype),
                torch.empty(*shape, dtype=self.dtype),
                torch.empty(self.images, self.tokens, 2 * self.n, dtype=self.dtype),
                torch.empty(self.channels, self.n, dtype=torch.float32),
                torch.empty(self.channels, dtype=torch.float32),
                torch.empty(self.channels, dtype=torch.float32),
            ]
            fields.point("du", *of_direction)
            gradients.append(of_direction)
        of_n = one_state if self.n == 1 else adjoint
        ran = self._run(of_n.backward, of_n.backward_scratch)
        run_tasks(lambda begin, end: of_n.sum_blocks(self.kind, *ran, begin, end), self.images)
        kernels.sum_images(*ran)
        return gradients, dz


def saved_size(tokens: int, channels: int, states: int, directions: int) -> int:
    """Return the number of values that `forward` saves for `backward`, per image: the states after each chunk."""
    return directions * -(-tokens // kernels.CHUNK) * states * channels


def forward(
    directions: list[Direction], z: Tensor | None, mix: Tensor | None, scale: float, delta_softplus: bool
) -> tuple[Tensor, Tensor]:
    """Return the output and the saved values, as `scan_reference` does."""
    return _Launch(directions, z, mix, scale, delta_softplus).forward()


def backward(
    grad: Tensor,
    directions: list[Direction],
    z: Tensor | None,
    mix: Tensor | None,
    scale: float,
    delta_softplus: bool,
    saved: Tensor,
    dz: Tensor | None = None,
) -> tuple[list[Direction], Tensor | None]:
    """Return the gradients of each direction's operands and of z; mix has none."""
    gradients, of_z = _Launch(directions, z, mix, scale, delta_softplus).backward(grad, saved, dz)
    of_directions = [
        direction_of((cast(g, x.dtype) for g, x in zip(of, operands_of(f), strict=True)), f.reverse)
        for of, f in zip(gradients, directions, strict=True)
    ]
    return of_directions, None if of_z is None or z is None else deliver(of_z, z.dtype, dz)
