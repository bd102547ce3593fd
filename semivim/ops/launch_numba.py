"""What the launchers of the kernels on a CPU share."""

import functools
import struct

import numba
import numpy as np
import torch
from torch import Tensor

from .eager import cast


def unavailable(device: torch.device) -> str | None:
    """Return why the numba kernels cannot run on a device, None if they can."""
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
        return "numba's compiler is switched off by NUMBA_DISABLE_JIT"
    return None if device.type == "cpu" else f"it runs on the CPU, not on {device.type}"


def dense_float(x: Tensor) -> Tensor:
    """Return a tensor as dense float32."""
    return cast(x, torch.float32).contiguous()


@functools.cache
def float_bits(x: float) -> int:
    """Return the bits of a float as an integer, for a field of 64 bits that is a float."""
    return int(np.float64(x).view(np.int64))


class Layout:
    """A record type of the kernels, and the place of each of its fields of 64 bits."""

    def __init__(self, kind: np.dtype) -> None:
        assert kind.itemsize == 8 * len(kind.names or ()), f"{kind} has fields that are not of 64 bits"
        self.kind = kind
        self.places = {name: place for place, name in enumerate(kind.names or ())}
        self.packing = struct.Struct(f"{len(self.places)}q")
        self.zeros = [0] * len(self.places)


class Fields:
    """A record's values in the order of its fields, 0 where none is given, and the tensors that they point to.

    A list, filled by place: an array's fields set one by one, or a dictionary sorted at the end, take three times as
    long, and the host's time for a small block is made of this.

    Args:
        layout: The record's.
        first: Values of its first fields.
    """

    def __init__(self, layout: Layout, *first: int) -> None:
        self.places = layout.places
        self.values = [*first, *layout.zeros[len(first) :]]
        self.kept: list[Tensor] = []

    def __getitem__(self, name: str) -> int:
        return self.values[self.places[name]]

    def __setitem__(self, name: str, value: int) -> None:
        self.values[self.places[name]] = value

    def point(self, name: str, *tensors: Tensor) -> None:
        """Give a field and those after it the addresses of tensors, which are kept alive."""
        self.kept += tensors
        place = self.places[name]
        self.values[place : place + len(tensors)] = [x.data_ptr() for x in tensors]

    def point_dense(self, name: str, *tensors: Tensor) -> None:
        """The same of tensors that are first made dense float32."""
        self.point(name, *[x if x.dtype is torch.float32 and x.is_contiguous() else dense_float(x) for x in tensors])

    def describe(self, name: str, dtype: torch.dtype, *tensors: Tensor) -> None:
        """Give the fields of tensors over tokens their addresses and strides in bytes, rows dense in a dtype.

        In the layout, the strides between images and between tokens follow the address, then the next tensor's fields.
        """
        place, size = self.places[name], dtype.itemsize
        for x in tensors:
            if x.dtype is not dtype:
                x = x.to(dtype)
            image, token, channel = x.stride()
            if channel != 1 and x.shape[2] != 1:
                x = x.contiguous()
                image, token, _ = x.stride()
            self.kept.append(x)
            self.values[place : place + 3] = x.data_ptr(), image * size, token * size
            place += 3


def records(layout: Layout, *fields: Fields) -> np.ndarray:
    """Return records with the values of fields."""
    size = layout.packing.size
    memory = bytearray(len(fields) * size)
    for place, of in enumerate(fields):
        layout.packing.pack_into(memory, place * size, *of.values)  # in a third of the time of an array of a list
    return np.ndarray(len(fields), layout.kind, memory)
