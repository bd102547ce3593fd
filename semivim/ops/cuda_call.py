"""Calling the autograd functions of mamba-ssm and causal-conv1d by their two halves.

An op may not differentiate inside itself, so it calls `forward` and `backward` with a context of its own.
"""

import torch
from torch import Tensor


def unavailable(device: torch.device) -> str | None:
    """Return why these packages cannot run on a device, None if they can."""
    return None if device.type == "cuda" else f"needs a CUDA device, got {device.type}"


class Context:
    """What an autograd function's forward leaves for its backward."""

    saved_tensors: tuple[Tensor | None, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors
