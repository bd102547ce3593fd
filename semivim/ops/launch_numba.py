"""What the launchers of the scan and of the convolution on a CPU share."""

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


def dense_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor over tokens in a dtype, its last dimension dense."""
    x = cast(x, dtype)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def dense_float(x: Tensor) -> Tensor:
    """Return a tensor as dense float32."""
    x = cast(x, torch.float32)
    return x if x.is_contiguous() else x.contiguous()


class Fields(dict[str, int]):
    """Values of a kernel's record by field, and the tensors whose addresses are among them."""

    def __init__(self, **values: int) -> None:
        super().__init__(values)
        self.kept: list[Tensor] = []

    def point(self, name: str, x: Tensor) -> Tensor:
        """Give a field the address of a tensor, which is kept alive and returned."""
        self.kept.append(x)
        self[name] = x.data_ptr()
        return x

    def describe(self, name: str, x: Tensor, dtype: torch.dtype) -> None:
        """Give the fields of a tensor over tokens its address and its strides in bytes, dense in a dtype."""
        x = self.point(name, dense_rows(x, dtype))
        image, token, _ = x.stride()
        self[f"{name}_image"], self[f"{name}_token"] = image * x.itemsize, token * x.itemsize


def records(kind: np.dtype, *fields: Fields) -> np.ndarray:
    """Return records of 64-bit values, 0 where none is given; setting field by field takes three times as long."""
    names = kind.names or ()
    return np.array([[of.get(name, 0) for name in names] for of in fields], np.int64).view(kind)[:, 0]
