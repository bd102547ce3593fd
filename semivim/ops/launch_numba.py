"""What the launchers of the kernels on a CPU share."""

import functools

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
    x = cast(x, torch.float32)
    return x if x.is_contiguous() else x.contiguous()


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


class Fields:
    """A record's values in the order of its fields, 0 where none is given, and the tensors that they point to.

    A list, filled by place: an array's fields set one by one, or a dictionary sorted at the end, take three times as
    long, and the host's time for a small block is made of this.
    """

    def __init__(self, layout: Layout, **values: int) -> None:
        self.places = layout.places
        self.values = [0] * len(self.places)
        self.kept: list[Tensor] = []
        for name, value in values.items():
            self.values[self.places[name]] = value

    def __getitem__(self, name: str) -> int:
        return self.values[self.places[name]]

    def __setitem__(self, name: str, value: int) -> None:
        self.values[self.places[name]] = value

    def point(self, name: str, x: Tensor) -> Tensor:
        """Give a field the address of a tensor, which is kept alive and returned."""
        self.kept.append(x)
        self.values[self.places[name]] = x.data_ptr()
        return x

    def describe(self, name: str, x: Tensor, dtype: torch.dtype) -> None:
        """Give the fields of a tensor over tokens its address and its strides in bytes, rows dense in a dtype.

        In the layout, the strides between images and between tokens follow the address.
        """
        x = cast(x, dtype)
        image, token, channel = x.stride()
        if channel != 1 and x.shape[2] != 1:
            x = x.contiguous()
            image, token, _ = x.stride()
        self.kept.append(x)
        place, size = self.places[name], x.itemsize
        self.values[place : place + 3] = x.data_ptr(), image * size, token * size


def records(layout: Layout, *fields: Fields) -> np.ndarray:
    """Return records with the values of fields."""
    values = np.array([of.values for of in fields], np.int64)
    return np.ndarray(len(fields), layout.kind, values)  # `view` asks in Python whether it may
