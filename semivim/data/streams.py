"""Endless streams of images, and the loader that yields the batches of each step.

A step's batch is a pure function of (seed, step, rank): each stream is the endless chain of its epochs, each a
permutation drawn from (seed, epoch), and a step takes the next images of it. Every image's augmentation is drawn from
(seed, epoch, image). So the batches are the same for any number of workers, ranks share each epoch without overlap, and
a run continues exactly from nothing but its step number.
"""

import logging
from collections.abc import Generator, Iterator, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from semivim.data.prefetch import prefetch
from semivim.data.sources import ImageSource, UnreadableImageError
from semivim.data.views import Pixels, View
from semivim.utils.stop_signal import leave_signals_to_the_parent
from semivim.utils.terminal import escape

_logger = logging.getLogger(__name__)

_MAX_CONSECUTIVE_UNREADABLE = 100


class Batch(NamedTuple):
    """One stream's images of a step, on the device."""

    views: tuple[Tensor, ...]  # one (b, c, h, w), float32, for each view of the stream
    label: Tensor | None  # (b,), int64, -1 where unknown; None in a stream without labels


class DrawnBatch(NamedTuple):
    """One stream's images of a step, as a worker process draws them."""

    views: tuple[Pixels, ...]
    label: Tensor | None
    skipped: Tensor  # (s,), int64, positions of unreadable images that others replaced


class EndlessOrder:
    """Positions of an endless, reshuffled pass over a set of images.

    Args:
        positions: The images.
        seed: Seed of the order.
        stream: Distinguishes several orders of one seed.
    """

    def __init__(self, positions: np.ndarray, seed: int, stream: int) -> None:
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        if not len(positions):
            raise ValueError("positions must name at least one image, got none")
        self.positions, self.seed, self.stream = positions, seed, stream
        self._cached: dict[int, np.ndarray] = {}

    def __getitem__(self, place: int) -> tuple[int, int]:
        """Give (epoch, image) at a place in the chain of epochs."""
        epoch, offset = divmod(place, len(self.positions))
        if epoch not in self._cached:
            if len(self._cached) > 1:
                self._cached.clear()
            rng = np.random.default_rng([self.seed, self.stream, epoch])
            self._cached[epoch] = rng.permutation(self.positions)
        return epoch, int(self._cached[epoch][offset])


class ImageStream(Dataset):
    """The batch of every step, by the number of the step; see the module docstring.

    Args:
        source: Where the images are.
        positions: The images of the stream, ``(n,)``, int64.
        views: Views of each image, drawn independently.
        batch_size: Images of one rank's step.
        labels: Class of every image of the source, -1 where unknown; None for batches without labels.
        seed: Seed of order and augmentation.
        stream: Number of this stream among those of one seed; each has its own order and augmentation.
        rank: This process.
        world_size: Number of processes.

    Raises:
        ValueError: If there are no positions, an argument is out of range, or the labels are not one for each image.
    """

    def __init__(
        self,
        source: ImageSource,
        positions: np.ndarray,
        views: Sequence[View],
        batch_size: int,
        *,
        labels: np.ndarray | None = None,
        seed: int = 42,
        stream: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size={world_size}), got {rank}")
        if labels is not None and len(labels) != len(source):
            raise ValueError(f"there are labels for {len(labels)} images, the source has {len(source)}")
        self.source, self.views, self.batch_size, self.labels = source, tuple(views), batch_size, labels
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.order = EndlessOrder(positions, seed, stream)

    def __getitem__(self, step: int) -> DrawnBatch:
        skipped: list[int] = []
        images, seeds, index = self._read(step, skipped)
        # A view takes two seeds for an image: the given one, and the next for random erasing.
        views = tuple(view(images, [seed + 2 * i for seed in seeds]) for i, view in enumerate(self.views))
        label = None if self.labels is None else torch.from_numpy(self.labels[index])
        return DrawnBatch(views, label, torch.tensor(skipped, dtype=torch.int64))

    def load(self, drawn: DrawnBatch, device: torch.device) -> Batch:
        """Copy a batch to the device and normalise and erase it there."""
        views = tuple(view.load(pixels, device) for view, pixels in zip(self.views, drawn.views, strict=True))
        return Batch(views, None if drawn.label is None else drawn.label.to(device, non_blocking=True))

    def _read(self, step: int, skipped: list[int]) -> tuple[list[Image.Image], list[int], list[int]]:
        """Decode one rank's images of a step; an unreadable one is replaced by the next of the order that is not."""
        first = (step * self.world_size + self.rank) * self.batch_size
        images, seeds, index = [], [], []
        for place in range(first, first + self.batch_size):
            for attempt in range(_MAX_CONSECUTIVE_UNREADABLE):
                epoch, position = self.order[place + attempt]
                try:
                    images.append(self.source.image(position))
                except UnreadableImageError as error:
                    skipped.append(position)
                    last_error = error
                    continue
                seeds.append(_mix_seed(self.seed, self.order.stream, epoch, position))
                index.append(position)
                break
            else:
                raise UnreadableImageError(
                    f"{_MAX_CONSECUTIVE_UNREADABLE} images in a row cannot be read; the last: {last_error}"
                ) from last_error
        return images, seeds, index


class _Steps(Dataset):
    """The batches of all streams, by the number of the step."""

    def __init__(self, streams: Sequence[ImageStream]) -> None:
        self.streams = streams

    def __getitem__(self, step: int) -> tuple[DrawnBatch, ...]:
        return tuple(stream[step] for stream in self.streams)


class _StepsFrom(Sampler):
    def __init__(self, start_step: int) -> None:
        self.start_step = start_step

    def __iter__(self) -> Iterator[int]:
        return count(self.start_step)


class StreamLoader:
    """Loads the batches of consecutive steps, in worker processes or in this one, onto the device.

    Args:
        streams: The streams that each step takes a batch of, all of one source.
        device: Where batches go.
        num_workers: Worker processes; 0 loads in this process.
        pin_memory: Load batches into page-locked memory, so that copies to a GPU overlap with computation.

    Attributes:
        unreadable: Times each unreadable image was skipped, by its position, in the batches yielded so far.

    Raises:
        ValueError: If the streams have several sources.
    """

    def __init__(
        self,
        streams: Sequence[ImageStream],
        device: torch.device | str = "cpu",
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.source = streams[0].source
        if any(stream.source is not self.source for stream in streams):
            raise ValueError("streams must share one source, whose positions count unreadable images; got several")
        self.streams, self.device = tuple(streams), torch.device(device)
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.unreadable: dict[int, int] = {}

    def steps(self, start_step: int = 0) -> Generator[tuple[Batch, ...], None, None]:
        """Yield the batches of ``start_step`` and all later steps, one for each stream, without end."""
        loader = DataLoader(
            _Steps(self.streams),
            batch_size=None,
            sampler=_StepsFrom(start_step),
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            worker_init_fn=leave_signals_to_the_parent,
        )
        # Counted only when the batch is used: a resumed run loads the prefetched batch again.
        for batches, skipped in prefetch(loader, self._move, self.device):
            for position in skipped:
                if position not in self.unreadable:
                    _logger.warning("skipped unreadable %s", escape(self.source.describe(position)))
                self.unreadable[position] = self.unreadable.get(position, 0) + 1
            yield batches

    def _move(self, drawn: tuple[DrawnBatch, ...]) -> tuple[tuple[Batch, ...], list[int]]:
        batches = tuple(stream.load(part, self.device) for stream, part in zip(self.streams, drawn, strict=True))
        return batches, [position for part in drawn for position in part.skipped.tolist()]


def _mix_seed(*parts: int) -> int:
    """Spread small integers over 62 bits (the finaliser of SplitMix64 on each part in turn)."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 2
