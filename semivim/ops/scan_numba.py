"""The selective scan on a CPU: describes tensors to the kernels, spreads their tasks over threads.

The kernels take float32 or, where all tensors over tokens have it, bfloat16; anything else is converted first.
"""

import numpy as np
import torch
from torch import Tensor

from . import scan_adjoint_numba as adjoint
from . import scan_kernels_numba as kernels
from . import scan_one_state_numba as one_state
from .launch_numba import dense_rows
from .launch_numba import unavailable as unavailable
from .scan_reference import Direction, direction_of, operands_of
from .threads import aligned_scratch, run_tasks
from .vector_numba import BFLOAT16, FLOAT32, LANES, LOG2_E


class _Launch:
    """A call's records, and the tensors whose addresses they hold."""

    def __init__(
        self, directions: list[Direction], z: Tensor | None, mix: Tensor | None, scale: float, softplus: bool
    ) -> None:
        over_tokens = [x for f in directions for x in (f.u, f.delta, f.bc)] + ([] if z is None else [z])
        self.dtype = torch.bfloat16 if all(x.dtype == torch.bfloat16 for x in over_tokens) else torch.float32
        self.kind = BFLOAT16 if self.dtype == torch.bfloat16 else FLOAT32
        self.kept: list[Tensor] = []
        self.u, self.n = directions[0].u, directions[0].A.shape[1]
        self.images, self.tokens, self.channels = self.u.shape
        self.padded = kernels.padded_states(self.n)
        self.blocks, self.lanes = -(-self.channels // kernels.BLOCK), -(-self.channels // LANES) * LANES
        self.call = np.zeros(1, kernels.CALL)
        self.directions = np.zeros(len(directions), kernels.DIRECTION)
        for field in ("tokens", "channels", "lanes", "blocks", "n", "padded"):
            self.call[field] = getattr(self, field)
        for field, value in (
            ("directions", len(directions)),
            ("softplus", softplus),
            ("size", self.dtype.itemsize),
            ("scale", scale),
        ):
            self.call[field] = value
        for row, f in zip(self.directions, directions, strict=True):
            for name in ("u", "delta", "bc"):
                self._describe(row, name, getattr(f, name))
            for name in ("D", "delta_bias"):
                self._address(row, name, getattr(f, name).to(torch.float32).contiguous())
            self._address(row, "A", self._transpose(f.A))
            row["reverse"] = f.reverse
        if z is not None:
            self._describe(self.call[0], "z", z)
        if mix is not None:
            self._address(self.call[0], "mix", mix.to(torch.float32).contiguous())

    def _address(self, row: np.void, name: str, x: Tensor) -> None:
        self.kept.append(x)
        row[name] = x.data_ptr()

    def _describe(self, row: np.void, name: str, x: Tensor) -> None:
        x = dense_rows(x, self.dtype)
        self._address(row, name, x)
        row[f"{name}_image"] = x.stride(0) * x.itemsize
        row[f"{name}_token"] = x.stride(1) * x.itemsize

    def _transpose(self, A: Tensor) -> Tensor:
        padded = A.new_zeros(self.padded, self.lanes, dtype=torch.float32)
        padded[: self.n, : self.channels] = A.t().float() * LOG2_E
        return padded

    def _new(self, row: np.void, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Allocate what the kernel writes to."""
        x = torch.empty(shape, dtype=self.dtype if dtype is None else dtype)
        self._address(row, name, x)
        return x

    def _new_sums(self, name: str, *shape: int) -> Tensor:
        """Allocate sums per image and direction, which the kernel adds to."""
        x = torch.zeros(self.images, len(self.directions), *shape, self.lanes, dtype=torch.float32)
        self._address(self.call[0], name, x)
        return x

    def _keep_total(self, result: Tensor) -> None:
        """Give the sums of the directions before the last one a place: the result's own where it holds float32."""
        if len(self.directions) > 1:
            wide = torch.float32
            self._address(
                self.call[0], "total", result if self.dtype == wide else torch.empty(result.shape, dtype=wide)
            )

    def _run(self, kernel, scratch_of) -> None:  # type: ignore[no-untyped-def]
        """Run a kernel's tasks, each thread with its own scratch."""

        def run_range(begin: int, end: int) -> None:
            place = np.zeros(1, kernels.PLACE)
            scratch = scratch_of(min(self.blocks, end - begin), self.padded)
            memory, address = aligned_scratch(sum(scratch.values()))
            for field, size in scratch.items():
                place[field] = address
                address += size
            kernel(self.kind, self.call, self.directions, place, begin, end)
            del memory

        run_tasks(run_range, self.images * self.blocks)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the output and the states after each chunk."""
        call = self.call[0]
        out = self._new(call, "out", *self.u.shape)
        size = saved_size(self.tokens, self.channels, self.n, len(self.directions))
        states = self._new(call, "states", self.images, size, dtype=torch.float32)
        self._keep_total(out)
        if call["mix"] and len(self.directions) > 1:
            self._new(call, "mixed", *self.u.shape, dtype=torch.float32)
        of_n = one_state if self.n == 1 else kernels
        self._run(of_n.forward, of_n.forward_scratch)
        return out.to(self.u.dtype), states

    def backward(self, grad: Tensor, states: Tensor) -> tuple[list[list[Tensor]], Tensor | None]:
        """Return the gradients of each direction's six operands and of z."""
        call, count = self.call[0], len(self.directions)
        self._describe(call, "grad", grad)
        self._address(call, "states", states.contiguous())
        blocks = self.images, self.blocks, count, self.tokens, 2, self.padded
        self._new(call, "sums", *blocks, dtype=torch.float32)
        dA = self._new_sums("dA", self.padded)[:, :, : self.n, : self.channels]
        dD, dbias = (self._new_sums(name)[:, :, : self.channels] for name in ("dD", "dbias"))
        dz = None
        if call["z"]:
            dz = self._new(call, "dz", *self.u.shape)
            self._keep_total(dz)
        gradients = []
        for row in self.directions:
            du, ddelta = (self._new(row, name, *self.u.shape) for name in ("du", "ddelta"))
            gradients.append([du, ddelta, self._new(row, "dbc", self.images, self.tokens, 2 * self.n)])
        of_n = one_state if self.n == 1 else adjoint
        self._run(of_n.backward, of_n.backward_scratch)
        run_tasks(lambda begin, end: of_n.sum_blocks(self.kind, self.call, self.directions, begin, end), self.images)
        for k, of_direction in enumerate(gradients):
            of_direction += [dA[:, k].sum(0).t().contiguous(), dD[:, k].sum(0), dbias[:, k].sum(0)]
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
        direction_of((g.to(x.dtype) for g, x in zip(of, operands_of(f), strict=True)), f.reverse)
        for of, f in zip(gradients, directions, strict=True)
    ]
    return of_directions, None if dz is None or z is None else dz.to(z.dtype)
