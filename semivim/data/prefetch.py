"""Copies of batches to the device, one batch ahead of their use."""

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import TypeVar

import torch

Loaded = TypeVar("Loaded")
Moved = TypeVar("Moved")


def prefetch(batches: Iterable[Loaded], move: Callable[[Loaded], Moved], device: torch.device) -> Iterator[Moved]:
    """Yield every batch after ``move``; on a GPU the next batch is copied while the current one is used.

    Args:
        batches: Batches in host memory; copies overlap with computation only from page-locked memory.
        move: Copies one batch to the device and prepares it there.
        device: Where batches go; they must be used on its current stream.
    """
    if device.type != "cuda":
        yield from map(move, batches)
        return
    side = _copy_stream(device)
    moved: list[Moved] = []
    for batch in batches:
        # The copy may reuse memory of an earlier batch, which kernels that are still queued may read.
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            moved.append(move(batch))
        if len(moved) > 1:
            yield moved.pop(0)
        torch.cuda.current_stream(device).wait_stream(side)
    yield from moved


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all batches of a process: memory freed on a stream is not reused by another stream."""
    return torch.cuda.Stream(device)
