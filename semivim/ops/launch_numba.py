"""What the launchers of the scan and of the convolution on a CPU share."""

import numba
import numpy as np
import torch
from torch import Tensor


def unavailable(device: torch.device) -> str | None:
    """Return why the numba kernels cannot run on a device, None if they can."""
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
        return "numba's compiler is switched off by NUMBA_DISABLE_JIT"
    return None if device.type == "cpu" else f"it runs on the CPU, not on {device.type}"


def filled(kind: np.dtype, **fields: int) -> np.ndarray:
    """Return one record of 64-bit integers, 0 where no value is given; setting field by field takes thrice the time."""
    return np.array([fields.get(name, 0) for name in kind.names or ()], np.int64).view(kind)


def dense_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor over tokens in a dtype, its last dimension dense."""
    x = x.to(dtype)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
