"""The selective scan on a CPU: describes tensors to the kernels, spreads their tasks over threads.

The kernels take float32 or, where all tensors over tokens have it, bfloat16; anything else is converted first.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import scan_adjoint_numba as adjoint
from . import scan_kernels_numba as kernels
from .launch_numba import dense_rows
from .launch_numba import unavailable as unavailable
from .scan_reference import Direction, direction_of, operands_of
from .threads import aligned_scratch, run_tasks
from .vector_numba import BFLOAT16, FLOAT32, LANES, LOG2_E


class _Side(NamedTuple):
    """One direction's operands."""

    u: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor
    A: Tensor
    D: Tensor | None
    bias: Tensor | None
    leak: Tensor | None
    reverse: bool


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()


class _Launch:
    """A call's records, and the tensors whose addresses they hold."""

    def __init__(self, sides: list[_Side], z: Tensor | None, scale: float, softplus: bool) -> None:
        over_tokens = [x for side in sides for x in side[:4]] + ([] if z is None else [z])
        self.dtype = torch.bfloat16 if all(x.dtype == torch.bfloat16 for x in over_tokens) else torch.float32
        self.kind = BFLOAT16 if self.dtype == torch.bfloat16 else FLOAT32
        self.kept: list[Tensor] = []
        self.u, self.n = sides[0].u, sides[0].A.shape[1]
        self.images, tokens, channels = self.u.shape
        self.padded = -(-self.n // kernels.TOGETHER) * kernels.TOGETHER
        self.lanes = -(-channels // LANES) * LANES
        self.call = np.zeros(1, kernels.CALL)
        self.sides = np.zeros(len(sides), kernels.DIRECTION)
        blocks = -(-channels // kernels.BLOCK)
        for field, value in (
            ("tokens", tokens),
            ("channels", channels),
            ("lanes", self.lanes),
            ("blocks", blocks),
            ("n", self.n),
            ("padded", self.padded),
            ("directions", len(sides)),
            ("softplus", softplus),
            ("size", self.dtype.itemsize),
            ("scale", scale),
        ):
            self.call[field] = value
        for row, side in zip(self.sides, sides, strict=True):
            for name in ("u", "delta", "B", "C"):
                self._describe(row, name, getattr(side, name))
            for name, field in (("D", "D"), ("bias", "bias"), ("leak", "mix")):
                self._address(row, field, _dense(getattr(side, name)))
            self._address(row, "A", self._transpose(side.A))
            row["reverse"] = side.reverse
        if z is not None:
            self._describe(self.call[0], "z", z)

    def _address(self, row: np.void, name: str, x: Tensor | None) -> None:
        if x is not None:
            self.kept.append(x)
            row[name] = x.data_ptr()

    def _describe(self, row: np.void, name: str, x: Tensor) -> None:
        x = dense_rows(x, self.dtype)
        self._address(row, name, x)
        row[f"{name}_image"] = x.stride(0) * x.itemsize
        row[f"{name}_token"] = x.stride(1) * x.itemsize

    def _transpose(self, A: Tensor) -> Tensor:
        padded = A.new_zeros(self.padded, self.lanes, dtype=torch.float32)
        padded[: self.n, : A.shape[0]] = A.t().float() * LOG2_E
        return padded

    def new(self, row: np.void, name: str, *shape: int, dtype: torch.dtype | None = None, zero: bool = False) -> Tensor:
        """Allocate what the kernel writes to."""
        make = torch.zeros if zero else torch.empty
        x = make(shape, dtype=self.dtype if dtype is None else dtype)
        self._address(row, name, x)
        return x

    def run(self, kernel, scratch_of) -> None:  # type: ignore[no-untyped-def]
        """Run a kernel's tasks, each thread with its own scratch."""
        blocks = int(self.call["blocks"][0])

        def run_range(begin: int, end: int) -> None:
            scratch = scratch_of(min(blocks, end - begin), self.padded)
            place = np.zeros(1, kernels.PLACE)
            memory, address = aligned_scratch(sum(scratch.values()))
            for field, size in scratch.items():
                place[field] = address
                address += size
            kernel(self.kind, self.call, self.sides, place, begin, end)
            del memory

        run_tasks(run_range, self.images * blocks)

    def forward(self) -> tuple[Tensor, Tensor]:
        call, (_, tokens, channels) = self.call[0], self.u.shape
        chunks = -(-tokens // kernels.CHUNK)
        out = self.new(call, "out", *self.u.shape)
        states = self.new(call, "states", self.images, len(self.sides), chunks, self.n, channels, dtype=torch.float32)
        if len(self.sides) > 1:
            self._address(
                call, "total", out if self.dtype == torch.float32 else torch.empty(out.shape, dtype=torch.float32)
            )
            if self.sides["mix"].any():
                self.new(call, "mixed", *self.u.shape, dtype=torch.float32)
        self.run(kernels.forward, kernels.forward_scratch)
        return out.to(self.u.dtype), states

    def backward(self, grad: Tensor, states: Tensor) -> tuple[Tensor | None, list[dict[str, Tensor]]]:
        """Return the gradient of z and, per direction, the others by name."""
        call, (_, tokens, channels), directions = self.call[0], self.u.shape, len(self.sides)
        wide = torch.float32
        self._describe(call, "grad", grad)
        self._address(call, "states", states.contiguous())
        padded, blocks = self.padded, int(call["blocks"])
        self.new(call, "dBC", self.images, blocks, directions, tokens, 2, padded, dtype=wide)
        dA = self.new(call, "dA", self.images, directions, padded, self.lanes, dtype=wide, zero=True)
        dD = self.new(call, "dD", self.images, directions, self.lanes, dtype=wide, zero=True)
        dbias = self.new(call, "dbias", self.images, directions, self.lanes, dtype=wide, zero=True)
        dz = self.new(call, "dz", *self.u.shape) if call["z"] else None
        gradients = []
        for row in self.sides:
            of_side = {name: self.new(row, f"d{name}", *self.u.shape) for name in ("u", "delta")}
            of_side["bc"] = self.new(row, "dB", self.images, tokens, 2 * self.n)
            row["dC"] = row["dB"] + self.n * self.dtype.itemsize
            row["dBC_token"] = 2 * self.n * self.dtype.itemsize
            gradients.append(of_side)
        if dz is not None and directions > 1:
            self._address(
                call, "total", dz if self.dtype == torch.float32 else torch.empty(dz.shape, dtype=torch.float32)
            )
        self.run(adjoint.backward, adjoint.backward_scratch)
        run_tasks(lambda begin, end: adjoint.sum_blocks(self.kind, self.call, self.sides, begin, end), self.images)
        for k, of_side in enumerate(gradients):
            of_side["A"] = dA[:, k, : self.n, :channels].sum(0).t().contiguous()
            of_side["D"] = dD[:, k, :channels].sum(0)
            of_side["bias"] = dbias[:, k, :channels].sum(0)
        return dz, gradients


def saved_size(tokens: int, channels: int, states: int, directions: int) -> int:
    """Return the number of values that `forward` saves for `backward`, per image: the states after each chunk."""
    return directions * -(-tokens // kernels.CHUNK) * states * channels


def _launch(
    directions: list[Direction], z: Tensor | None, mix: Tensor | None, scale: float, delta_softplus: bool
) -> _Launch:
    sides = []
    for k, f in enumerate(directions):
        B, C = f.bc.chunk(2, -1)
        sides.append(_Side(f.u, f.delta, B, C, f.A, f.D, f.delta_bias, None if mix is None else mix[:, k], f.reverse))
    return _Launch(sides, z, scale, delta_softplus)


def forward(
    directions: list[Direction], z: Tensor | None, mix: Tensor | None, scale: float, delta_softplus: bool
) -> tuple[Tensor, Tensor]:
    """Return the output and the saved values, as `scan_reference` does."""
    out, states = _launch(directions, z, mix, scale, delta_softplus).forward()
    return out, states.flatten(1)


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
    dz, gradients = _launch(directions, z, mix, scale, delta_softplus).backward(grad, saved)
    of_directions = [
        direction_of((g.to(x.dtype) for g, x in zip(of.values(), operands_of(f), strict=True)), f.reverse)
        for of, f in zip(gradients, directions, strict=True)
    ]
    return of_directions, None if dz is None or z is None else dz.to(z.dtype)
