"""Batches of labelled images and of unlabelled images in two views, by step number.

A step's batch is a pure function of (seed, step, rank): each stream of images is the endless chain of its epochs, each
a permutation drawn from (seed, epoch), and a step takes the next images of it. Every image's augmentation is drawn from
(seed, epoch, image). So the batches are the same for any number of workers, ranks share each epoch without overlap, and
a run continues exactly from nothing but its step number.
"""

import logging
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from semivim.data.evaluation import LabelledBatch
from semivim.data.label_split import LabelSplit
from semivim.data.sources import ImageSource, UnreadableImageError
from semivim.data.views import View, _private_randomness

_logger = logging.getLogger(__name__)
_MAX_CONSECUTIVE_UNREADABLE = 100


class Views(NamedTuple):
    """The three ways a semi-supervised step looks at images."""

    labelled: View
    weak: View
    strong: View


class UnlabelledBatch(NamedTuple):
    """Images in two independent views; the labels serve statistics only."""

    weak: Tensor  # (b, c, h, w)
    strong: Tensor  # (b, c, h, w)
    label: Tensor  # (b,), int64, -1 where unknown


class SslBatch(NamedTuple):
    """What one step trains on."""

    labelled: LabelledBatch
    unlabelled: UnlabelledBatch | None
    skipped: Tensor  # (s,), int64, positions of unreadable images that others were taken for


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


class StepBatches(Dataset):
    """The batch of every step, by its number; see the module's text.

    Args:
        source: The training set's images.
        split: Which of them are labelled, as what, and which are used without labels.
        views: How they are seen.
        batch_size: Labelled images of one rank's step.
        unlabelled_batch_size: Unlabelled images of one rank's step; 0 for purely supervised steps.
        seed: Seed of order and augmentation.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        source: ImageSource,
        split: LabelSplit,
        views: Views,
        batch_size: int,
        unlabelled_batch_size: int,
        seed: int = 42,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1 or unlabelled_batch_size < 0:
            raise ValueError(
                f"batch_size must be at least 1 and unlabelled_batch_size at least 0, "
                f"got {batch_size} and {unlabelled_batch_size}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size={world_size}), got {rank}")
        if len(split.labels) != len(source):
            raise ValueError(f"split covers {len(split.labels)} images, the source has {len(source)}")
        if unlabelled_batch_size and not len(split.unlabelled):
            raise ValueError(
                f"no unlabelled image is left: all {len(split.labelled)} are labelled; label fewer, add unlabelled "
                f"ones (--unlabeled-dir, --unlabeled-include-labeled) or train with --ssl-method supervised"
            )
        self.source, self.split, self.views = source, split, views
        self.batch_size, self.unlabelled_batch_size = batch_size, unlabelled_batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.labelled = EndlessOrder(split.labelled, seed, stream=0)
        self.unlabelled = EndlessOrder(split.unlabelled, seed, stream=1)

    def __getitem__(self, step: int) -> SslBatch:
        with _private_randomness():
            skipped: list[int] = []
            images, seeds, index = self._draw(self.labelled, step, self.batch_size, skipped)
            label = torch.from_numpy(self.split.labels[index])
            labelled = LabelledBatch(self.views.labelled(images, seeds), label)
            unlabelled = None
            if self.unlabelled_batch_size:
                images, seeds, index = self._draw(self.unlabelled, step, self.unlabelled_batch_size, skipped)
                unlabelled = UnlabelledBatch(
                    weak=self.views.weak(images, seeds),
                    strong=self.views.strong(images, [seed + 2 for seed in seeds]),
                    label=torch.from_numpy(self.split.labels[index]),
                )
        return SslBatch(labelled, unlabelled, torch.tensor(skipped, dtype=torch.int64))

    def _draw(
        self, order: EndlessOrder, step: int, batch_size: int, skipped: list[int]
    ) -> tuple[list[Image.Image], list[int], list[int]]:
        """Decode one rank's images of a step; an unreadable one is replaced by the next of the order that is not."""
        first = (step * self.world_size + self.rank) * batch_size
        images, seeds, index = [], [], []
        for place in range(first, first + batch_size):
            for attempt in range(_MAX_CONSECUTIVE_UNREADABLE):
                epoch, position = order[place + attempt]
                try:
                    images.append(self.source.image(position))
                except UnreadableImageError as error:
                    skipped.append(position)
                    last_error = error
                    continue
                seeds.append(_mix_seed(self.seed, order.stream, epoch, position))
                index.append(position)
                break
            else:
                raise UnreadableImageError(
                    f"{_MAX_CONSECUTIVE_UNREADABLE} images in a row cannot be read; the last: {last_error}"
                ) from last_error
        return images, seeds, index


class _StepsFrom(Sampler):
    def __init__(self, start_step: int) -> None:
        self.start_step = start_step

    def __iter__(self) -> Iterator[int]:
        return count(self.start_step)


class SslLoader:
    """Loads the batches of consecutive steps, in worker processes or in this one.

    Args:
        batches: The batch of every step.
        num_workers: Worker processes; 0 loads in this process.
        pin_memory: Put batches into page-locked memory.

    Attributes:
        unreadable: Times each unreadable image was skipped, by its position, so far.
    """

    def __init__(self, batches: StepBatches, num_workers: int = 0, pin_memory: bool = False) -> None:
        self.batches, self.num_workers, self.pin_memory = batches, num_workers, pin_memory
        self.unreadable: dict[int, int] = {}

    def steps(self, start_step: int = 0) -> Iterator[SslBatch]:
        """Give the batches of ``start_step`` and all that follow, without end."""
        loader = DataLoader(
            self.batches,
            batch_size=None,
            sampler=_StepsFrom(start_step),
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
        )
        for batch in loader:
            for position in batch.skipped.tolist():
                if position not in self.unreadable:
                    _logger.warning("skipped unreadable %s", self.batches.source.describe(position))
                self.unreadable[position] = self.unreadable.get(position, 0) + 1
            yield batch


def _mix_seed(*parts: int) -> int:
    """Spread small integers over 62 bits (the finaliser of SplitMix64 on each part in turn)."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 2
