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
from .eager import cast
from .launch_numba import Fields, Layout, dense_float, float_bits, records
from .launch_numba import unavailable as unavailable
from .scan_reference import Direction, direction_of, operands_of
from .threads import aligned_scratch, run_tasks
from .vector_numba import BFLOAT16, FLOAT32, LANES

_CALL, _DIRECTION, _PLACE = (Layout(kind) for kind in (kernels.CALL, kernels.DIRECTION, kernels.PLACE))
_SCRATCH = _PLACE.places["h"]  # from this field of a place on, addresses in its scratch


@functools.cache
def _scratch(sizes: Callable[[int, int], dict[str, int]], blocks: int, padded: int) -> tuple[int, np.ndarray]:
    """Return the bytes of a thread's scratch for some blocks, and a place's values with the scratch at address 0."""
    place, size = Fields(_PLACE), 0
    for field, of_field in sizes(blocks, padded).items():
        place[field] = size
        size += of_field
    return size, np.array(place.values, np.int64)


class _Launch:
    """What the kernels are told of a call: the fields of their records."""

    def __init__(
        self, directions: list[Direction], z: Tensor | None, mix: Tensor | None, scale: float, softplus: bool
    ) -> None:
        self.u, self.n = directions[0].u, directions[0].A.shape[1]
        self.images, self.tokens, self.channels = self.u.shape
        self.padded = kernels.padded_states(self.n)
        self.blocks, self.lanes = -(-self.channels // kernels.BLOCK), -(-self.channels // LANES) * LANES
        dtypes = {x.dtype for f in directions for x in (f.u, f.delta, f.bc)} | ({z.dtype} if z is not None else set())
        self.dtype = torch.bfloat16 if dtypes == {torch.bfloat16} else torch.float32
        self.kind = BFLOAT16 if self.dtype == torch.bfloat16 else FLOAT32
        self.call = Fields(
            _CALL,
            images=self.images,
            tokens=self.tokens,
            channels=self.channels,
            lanes=self.lanes,
            blocks=self.blocks,
            n=self.n,
            padded=self.padded,
            directions=len(directions),
            softplus=softplus,
            size=self.dtype.itemsize,
            scale=float_bits(scale),
        )
        self.directions = []
        for f in directions:
            fields = Fields(_DIRECTION, reverse=f.reverse)
            fields.describe("u", f.u, self.dtype)
            fields.describe("delta", f.delta, self.dtype)
            fields.describe("bc", f.bc, self.dtype)
            fields.point("A", dense_float(f.A))
            fields.point("D", dense_float(f.D))
            fields.point("delta_bias", dense_float(f.delta_bias))
            fields.point("rates", torch.empty(self.padded, self.lanes, dtype=torch.float32))
            self.directions.append(fields)
        if z is not None:
            self.call.describe("z", z, self.dtype)
        if mix is not None:
            self.call.point("mix", dense_float(mix))

    def _keep_total(self, result: Tensor) -> None:
        """Give the sums of the directions before the last one a place: the result's own where it holds float32."""
        if len(self.directions) > 1:
            wide = torch.float32
            self.call.point("total", result if self.dtype == wide else torch.empty(*result.shape, dtype=wide))

    def _run(
        self, kernel: Callable[..., None], scratch_sizes: Callable[[int, int], dict[str, int]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Run a kernel's tasks, each thread with its own scratch; return the records."""
        call, directions = records(_CALL, self.call), records(_DIRECTION, *self.directions)
        kernels.transpose_rates(call, directions)

        def run_range(begin: int, end: int) -> None:
            size, of_place = _scratch(scratch_sizes, min(self.blocks, end - begin), self.padded)
            memory, address = aligned_scratch(size)
            place = of_place.copy()
            place[_SCRATCH:] += address
            kernel(self.kind, call, directions, np.ndarray(1, _PLACE.kind, place), begin, end)
            del memory

        run_tasks(run_range, self.images * self.blocks)
        return call, directions

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the output and the states after each chunk."""
        shape = self.images, self.tokens, self.channels  # unpacked, sizes are read in half the time
        out = self.call.point("out", torch.empty(*shape, dtype=self.dtype))
        size = saved_size(self.tokens, self.channels, self.n, len(self.directions))
        states = self.call.point("states", torch.empty(self.images, size, dtype=torch.float32))
        self._keep_total(out)
        if self.call["mix"] and len(self.directions) > 1:
            self.call.point("mixed", torch.empty(*shape, dtype=torch.float32))
        of_n = one_state if self.n == 1 else kernels
        self._run(of_n.forward, of_n.forward_scratch)
        return cast(out, self.u.dtype), states

    def backward(self, grad: Tensor, states: Tensor) -> tuple[list[list[Tensor]], Tensor | None]:
        """Return the gradients of each direction's six operands and of z."""
        call, count = self.call, len(self.directions)
        shape = self.images, self.tokens, self.channels
        call.describe("grad", grad, self.dtype)
        call.point("states", dense_float(states))  # hooks on saved tensors may have changed it
        blocks = self.images, self.blocks, count, self.tokens
        call.point("sums", torch.empty(*blocks, 2, self.padded, dtype=torch.float32))
        # Sums over tokens per image, which the kernel adds to: those of A, then of D and of the bias of delta.
        per_image = call.point("dA", torch.zeros(self.images * count, self.padded + 2, self.lanes, dtype=torch.float32))
        call["dD"] = call["dA"] + self.images * count * self.padded * self.lanes * per_image.itemsize
        call["dbias"] = call["dD"] + self.images * count * self.lanes * per_image.itemsize
        dz = None
        if call["z"]:
            dz = call.point("dz", torch.empty(*shape, dtype=self.dtype))
            self._keep_total(dz)
        gradients = []
        for fields in self.directions:
            du, ddelta = (fields.point(name, torch.empty(*shape, dtype=self.dtype)) for name in ("du", "ddelta"))
            dbc = fields.point("dbc", torch.empty(self.images, self.tokens, 2 * self.n, dtype=self.dtype))
            dA = fields.point("dA", torch.empty(self.channels, self.n, dtype=torch.float32))
            dD, dbias = (
                fields.point(name, torch.empty(self.channels, dtype=torch.float32)) for name in ("dD", "dbias")
            )
            gradients.append([du, ddelta, dbc, dA, dD, dbias])
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
) -> tuple[list[Direction], Tensor | None]:
    """Return the gradients of each direction's operands and of z; mix has none."""
    gradients, dz = _Launch(directions, z, mix, scale, delta_softplus).backward(grad, saved)
    of_directions = [
        direction_of((cast(g, x.dtype) for g, x in zip(of, operands_of(f), strict=True)), f.reverse)
        for of, f in zip(gradients, directions, strict=True)
    ]
    return of_directions, None if dz is None or z is None else cast(dz, z.dtype)
