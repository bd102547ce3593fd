"""Batches of labelled images and of unlabelled images in two views, by step number.

A step's batch is a pure function of (seed, step, rank): each stream of images is the endless chain of its epochs, each
a permutation drawn from (seed, epoch), and a step takes the next images of it. Every image's augmentation is drawn from
(seed, epoch, image). So the batches are the same for any number of workers, ranks share each epoch without overlap, and
a run continues exactly from nothing but its step number.
"""

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from semivim.data.label_split import LabelSplit
from semivim.data.sources import ImageSource, UnreadableImageError

_logger = logging.getLogger(__name__)

_IMAGE_MODE = {1: "L", 3: "RGB"}
_MAX_CONSECUTIVE_UNREADABLE = 100


class View:
    """A way to turn decoded images into normalised float tensors.

    Args:
        input_size: (channels, height, width), 1 or 3 channels; images are converted to grey or RGB.
        mean: Mean of each channel, of pixels in [0, 1].
        std: Standard deviation of each channel.
        is_training: Random augmentation, or the centre crop of evaluation.
        re_prob: Probability of random erasing.
        re_mode: Filling of an erased box: 'const', 'rand' or 'pixel'.
        re_count: Largest number of erased boxes.
        **transform: timm's ``create_transform`` arguments (scale, ratio, hflip, vflip, color_jitter, auto_augment,
            interpolation, crop_pct, ...).
    """

    def __init__(
        self,
        input_size: tuple[int, int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        is_training: bool = True,
        re_prob: float = 0.0,
        re_mode: str = "pixel",
        re_count: int = 1,
        **transform: Any,
    ) -> None:
        channels = input_size[0]
        if channels not in _IMAGE_MODE:
            raise ValueError(f"input_size must have 1 or 3 channels, got {channels}")
        if len(mean) != channels or len(std) != channels:
            raise ValueError(f"mean and std must have {channels} values, got {len(mean)} and {len(std)}")
        self.mode = _IMAGE_MODE[channels]
        # Ends in uint8 pixels; a whole batch is normalised at once, then erased.
        self.pixels = create_transform(
            input_size, is_training=is_training, use_prefetcher=True, mean=mean, std=std, **transform
        )
        _keep_one_bit(self.pixels)
        self.mean = torch.tensor(mean).view(-1, 1, 1) * 255
        self.std = torch.tensor(std).view(-1, 1, 1) * 255
        self.erasing = RandomErasing(re_prob, mode=re_mode, max_count=re_count, device="cpu") if re_prob else None

    def __call__(self, images: list[Image.Image], seeds: list[int]) -> Tensor:
        """Draw the view of every image from its own seed, ``(len(images), channels, height, width)``, float32."""
        pixels = []
        for image, seed in zip(images, seeds, strict=True):
            _seed_all(seed)
            pixels.append(self.pixels(image if image.mode == self.mode else image.convert(self.mode)))
        batch = torch.stack(pixels).float().sub_(self.mean).div_(self.std)
        if self.erasing is not None:
            for row, seed in zip(batch, seeds, strict=True):
                _seed_all(seed + 1)
                self.erasing(row)
        return batch


def _keep_one_bit(pixels: Any) -> None:
    """Let timm's posterize keep at least one bit: with none the image is black, and Pillow 13 refuses to draw it."""
    for step in getattr(pixels, "transforms", ()):
        if isinstance(step, RandAugment):
            operations = list(step.ops)
        elif isinstance(step, AutoAugment):
            operations = [operation for policy in step.policy for operation in policy]
        else:
            continue
        for operation in operations:
            if operation.name.startswith("Posterize"):
                operation.level_fn = _AtLeastOneBit(operation.level_fn)


class _AtLeastOneBit:
    def __init__(self, level_fn: Any) -> None:
        self.level_fn = level_fn

    def __call__(self, level: float, hparams: dict[str, Any]) -> tuple[int]:
        return (max(1, self.level_fn(level, hparams)[0]),)


class Views(NamedTuple):
    """The three ways a semi-supervised step looks at images."""

    labelled: View
    weak: View
    strong: View


class LabelledBatch(NamedTuple):
    """Images with labels."""

    image: Tensor  # (b, c, h, w)
    label: Tensor  # (b,), int64


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


class EvaluationImages(Dataset):
    """Images with labels in one fixed view; an unreadable one is an error."""

    def __init__(self, source: ImageSource, view: View, positions: np.ndarray) -> None:
        self.source, self.view, self.positions = source, view, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitems__(self, places: list[int]) -> LabelledBatch:
        index = self.positions[places]
        images = [self.source.image(int(position)) for position in index]
        with _private_randomness():
            return LabelledBatch(self.view(images, [0] * len(images)), torch.from_numpy(self.source.labels[index]))


def create_eval_loader(
    source: ImageSource,
    view: View,
    batch_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """Give every image with its label exactly once, over all ranks together.

    Args:
        source: Images, all with known labels.
        view: A view with ``is_training=False``.
        batch_size: Images of one batch; the last one may be smaller.
        num_workers: Worker processes; 0 loads in this process.
        pin_memory: Put batches into page-locked memory.
        rank: This process, which gets every ``world_size``-th image.
        world_size: Number of processes.

    Returns:
        A loader of ``LabelledBatch``.

    Raises:
        ValueError: If an image has no known label.
    """
    unknown = np.flatnonzero(source.labels < 0)
    if len(unknown):
        raise ValueError(f"{len(unknown)} evaluation images have no label, the first is {source.describe(unknown[0])}")
    positions = np.arange(rank, len(source), world_size)
    return DataLoader(
        EvaluationImages(source, view, positions),
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=_already_collated,
    )


def _already_collated(batch: Any) -> LabelledBatch:
    return batch


def _mix_seed(*parts: int) -> int:
    """Spread small integers over 62 bits (the finaliser of SplitMix64 on each part in turn)."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 2


def _seed_all(seed: int) -> None:
    """Seed the three generators that timm's and torchvision's transforms draw from."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


@contextmanager
def _private_randomness() -> Iterator[None]:
    """Leave the process's generators as they were: drop path must not depend on where images are loaded."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
