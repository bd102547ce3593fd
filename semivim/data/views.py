"""Views: decoded images become normalised tensors."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from torch import Tensor

_IMAGE_MODE = {1: "L", 3: "RGB"}


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
