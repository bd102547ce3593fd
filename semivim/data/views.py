"""Views: decoded images become uint8 pixels in a worker process, and normalised float32 input on the device.

Everything random about an image's view is drawn from that image's own seed, in the worker. So the view does not depend
on the number of workers, the other images of the batch, the rank or the device.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from semivim.data.four_channels import augment_operations, keep_alpha_apart

_IMAGE_MODE = {1: "L", 3: "RGB", 4: "RGBA"}


class Pixels(NamedTuple):
    """Images in one view, before normalisation, and the boxes that random erasing fills after it."""

    pixels: Tensor  # (b, c, h, w), uint8
    boxes: Tensor  # (n, 5), int64: image, top, left, height and width of each erased box, in pixels
    fill: Tensor  # (m,), float32: the boxes' values one after another, (c, height, width) or (c, 1, 1) each


class View:
    """Turns decoded images into model input, in two steps: :meth:`__call__` in a worker, :meth:`load` on the device.

    Args:
        input_size: (channels, height, width), 1, 3 or 4 channels; images are converted to grey, RGB or RGBA.
        mean: Mean of each channel, of pixels in [0, 1].
        std: Standard deviation of each channel.
        is_training: Random augmentation, or the centre crop of evaluation.
        re_prob: Probability of random erasing.
        re_mode: Filling of an erased box: 'const', 'rand' or 'pixel'.
        re_count: Largest number of erased boxes.
        **transform: timm's ``create_transform`` arguments (scale, ratio, hflip, vflip, color_jitter, auto_augment,
            interpolation, crop_pct, ...).

    Raises:
        ValueError: If there are not 1, 3 or 4 channels, or not one mean and one standard deviation for each.
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
            raise ValueError(f"input_size must have 1, 3 or 4 channels, got {channels}")
        if len(mean) != channels or len(std) != channels:
            raise ValueError(f"mean and std must have {channels} values, got {len(mean)} and {len(std)}")
        self.mode = _IMAGE_MODE[channels]
        self.mean, self.std = tuple(mean), tuple(std)
        # With use_prefetcher the transform ends in uint8 pixels, and leaves normalisation and erasing to the device.
        self.transform = create_transform(
            input_size, is_training=is_training, use_prefetcher=True, mean=mean, std=std, **transform
        )
        _keep_one_bit(self.transform)
        if channels == 4:
            keep_alpha_apart(self.transform)
        self.erasing = RandomErasing(re_prob, mode=re_mode, max_count=re_count, device="cpu") if re_prob else None

    def __call__(self, images: list[Image.Image], seeds: list[int]) -> Pixels:
        """Draw the view of every image from its own seed; the process's random generators keep their state."""
        pixels, boxes, fill = [], [], [torch.empty(0)]
        with _generators_restored():
            for i, (image, seed) in enumerate(zip(images, seeds, strict=True)):
                _seed_generators(seed)
                pixels.append(self.transform(image if image.mode == self.mode else image.convert(self.mode)))
                if self.erasing is not None:
                    _seed_generators(seed + 1)
                    erased = _ErasedBoxes(pixels[-1].shape)
                    self.erasing(erased)
                    boxes += [(i, *box) for box in erased.boxes]
                    fill += erased.fill
        return Pixels(torch.stack(pixels), torch.tensor(boxes, dtype=torch.int64).view(-1, 5), torch.cat(fill))

    def load(self, drawn: Pixels, device: torch.device) -> Tensor:
        """Copy a batch to a device, without waiting for the copy, and normalise and erase it there.

        Returns:
            ``(b, c, h, w)``, float32, bit-identical on every device.
        """
        pixels, fill = (part.to(device, non_blocking=True) for part in (drawn.pixels, drawn.fill))
        images = normalise(pixels, _per_channel(self.mean, device), _per_channel(self.std, device))
        if self.erasing is not None:
            images = erase(images, drawn.boxes, fill, per_pixel=self.erasing.per_pixel)
        return images


def least_side(input_size: tuple[int, int, int], share: float) -> int:
    """Pixels on a side of which a crop still has twice the model's, so that a larger original may be shrunk first.

    Args:
        input_size: (channels, height, width) of the model.
        share: Least share of the area that is cropped.
    """
    return int(2 * max(input_size[1:]) / max(share, 1e-4) ** 0.5)


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std.

    Args:
        pixels: x, ``(b, c, h, w)``, uint8.
        mean: ``(c, 1, 1)``, float32, in the unit of the pixels.
        std: ``(c, 1, 1)``, float32, likewise.

    Returns:
        ``(b, c, h, w)``, float32.
    """
    return pixels.float().sub_(mean).div_(std)


def erase(images: Tensor, boxes: Tensor, fill: Tensor, per_pixel: bool) -> Tensor:
    """Overwrite boxes of images, in order: a later box covers an earlier one.

    Args:
        images: ``(b, c, h, w)``, float32, on any device; changed in place.
        boxes: ``(n, 5)``, int64, in host memory: image, top, left, height and width.
        fill: ``(m,)``, float32, on the device of ``images``: values of the boxes one after another.
        per_pixel: Whether a box has a value for each of its pixels and channels, or one for each channel.

    Returns:
        ``images``.
    """
    channels, start = images.shape[1], 0
    for i, top, left, height, width in boxes.tolist():
        shape = (channels, height, width) if per_pixel else (channels, 1, 1)
        values = fill[start : (start := start + shape[0] * shape[1] * shape[2])].view(shape)
        images[i, :, top : top + height, left : left + width] = values
    return images


class _ErasedBoxes:
    """Takes the place of an image in timm's RandomErasing, and records what timm would write into it."""

    dtype = torch.float32

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self.boxes: list[tuple[int, int, int, int]] = []
        self.fill: list[Tensor] = []

    def size(self) -> torch.Size:
        return self.shape

    def __setitem__(self, box: tuple[slice, slice, slice], values: Tensor) -> None:
        _, rows, columns = box
        self.boxes.append((rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start))
        self.fill.append(values.flatten())


@cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Values for pixels in [0, 255], ``(c, 1, 1)``; cached, because the copy to a device waits for that device."""
    return (torch.tensor(values).view(-1, 1, 1) * 255).to(device)


def _keep_one_bit(transform: Any) -> None:
    """Let timm's posterize keep at least one bit: with none the image is black, and Pillow 13 refuses to draw it."""
    for step in transform.transforms:
        for operation in augment_operations(step):
            if operation.name.startswith("Posterize"):
                operation.level_fn = _AtLeastOneBit(operation.level_fn)


class _AtLeastOneBit:
    def __init__(self, level_fn: Any) -> None:
        self.level_fn = level_fn

    def __call__(self, level: float, hparams: dict[str, Any]) -> tuple[int]:
        return (max(1, self.level_fn(level, hparams)[0]),)


def _seed_generators(seed: int) -> None:
    """Seed the three generators that timm's and torchvision's transforms draw from."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


@contextmanager
def _generators_restored() -> Iterator[None]:
    """Restore the process's generators: dropout must not depend on which process draws the views."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
