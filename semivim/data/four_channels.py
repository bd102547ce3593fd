"""Transforms of images with four channels: red, green, blue, and alpha or what is kept in its place, as near infrared.

Operations on colour change the first three channels only. Operations that move pixels treat all four alike; on an image
of mode RGBA, Pillow would weigh the colours by alpha, and lose them where it is 0.
"""

from collections.abc import Callable
from typing import Any

from PIL import Image
from timm.data.auto_augment import AugmentOp, AugMixAugment, AutoAugment, RandAugment
from timm.data.transforms import MaybePILToTensor
from torchvision import transforms

_MOVING = ("Rotate", "Shear", "Translate")  # how timm's names of these operations begin; the others are on colour
_COLOUR_STEPS = (transforms.ColorJitter, transforms.RandomGrayscale, transforms.RandomApply)  # of jitter or blur


def augment_operations(step: Any) -> list[AugmentOp]:
    """Operations that timm's AutoAugment, RandAugment or AugMix draws from; none of any other step."""
    if isinstance(step, RandAugment | AugMixAugment):
        return list(step.ops)
    if isinstance(step, AutoAugment):
        return [operation for policy in step.policy for operation in policy]
    return []


def keep_alpha_apart(transform: transforms.Compose) -> None:
    """Change the steps of timm's ``create_transform``, each on pictures, to take and return mode RGBA."""
    for position, step in enumerate(transform.transforms):
        if operations := augment_operations(step):
            for operation in operations:
                operation.aug_fn = _wrapped(operation.aug_fn, not operation.name.startswith(_MOVING))
        elif not isinstance(step, MaybePILToTensor):
            transform.transforms[position] = _wrapped(step, isinstance(step, _COLOUR_STEPS))


def _wrapped(operation: Any, on_colour: bool) -> Any:
    return _Colours(operation) if on_colour else _EachChannel(operation)


class _Colours:
    """Applies an operation to red, green and blue, and puts the fourth channel back."""

    def __init__(self, operation: Callable[..., Image.Image]) -> None:
        self.operation = operation

    def __call__(self, image: Image.Image, *args: Any, **kwargs: Any) -> Image.Image:
        *colours, alpha = image.split()
        changed = self.operation(Image.merge("RGB", colours), *args, **kwargs)
        return Image.merge("RGBA", (*changed.split(), alpha))


class _EachChannel:
    """Applies an operation to four channels alike, which Pillow does in mode RGBX."""

    def __init__(self, operation: Callable[..., Image.Image]) -> None:
        self.operation = operation

    def __call__(self, image: Image.Image, *args: Any, **kwargs: Any) -> Image.Image:
        moved = self.operation(Image.merge("RGBX", image.split()), *args, **kwargs)
        return Image.merge("RGBA", moved.split())
