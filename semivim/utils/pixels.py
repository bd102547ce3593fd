"""Pixels of a decoded image as 8 bits of grey, of each colour, or of each colour and alpha."""

from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from semivim.utils.user_error import UserError

_TIFF_BITS_PER_SAMPLE, _TIFF_SAMPLES_PER_PIXEL, _TIFF_MAX_SAMPLE_VALUE = 258, 277, 281
_8_BIT_MAX, _16_BIT_MAX = 2**8 - 1, 2**16 - 1


class PixelRules(NamedTuple):
    """What Pillow's own conversion leaves open.

    ``alpha_background`` is the colour behind transparent pixels, red, green and blue in [0, 255], None to keep alpha as
    the fourth channel; ``max_value`` the value that is white in grey images of more than 8 bits, None for the maximum
    that the file states.
    """

    alpha_background: tuple[int, int, int] | None = (255, 255, 255)
    max_value: int | None = None


MAX_ASPECT_RATIO = 50
DEFAULT_RULES = PixelRules()


def usual_rules(channels: int) -> PixelRules:
    """Rules for a model's number of channels: of four, alpha is the last."""
    return PixelRules(alpha_background=None) if channels == 4 else DEFAULT_RULES


def refuse_extreme_shape(image: Image.Image) -> None:
    """Refuse an image that would take gigabytes once its shorter side is enlarged to a model's input.

    Raises:
        UserError: If one side is more than ``MAX_ASPECT_RATIO`` times the other.
    """
    long, short = max(image.size), min(image.size)
    if long > MAX_ASPECT_RATIO * short:
        raise UserError(f"its sides are {image.width} and {image.height} pixels, wanted a ratio of {MAX_ASPECT_RATIO}")


def to_8_bit(image: Image.Image, rules: PixelRules) -> Image.Image:
    """Convert to 'L' or 'RGB', or to 'RGBA' where alpha is kept and the image has it.

    Pillow drops transparency, which leaves the arbitrary colour of invisible pixels, and clips deep pixels at 255.

    Raises:
        UserError: If the range of the pixels is not known, or alpha is kept and Pillow drops a fourth channel.
    """
    if white := white_value(image, rules):
        deep = np.asarray(image).astype(np.int64)
        return Image.fromarray((deep * 256 // (white + 1)).clip(0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UserError(
            f"the range of its pixels is not known (mode {image.mode}), wanted 8 or 16 bits a channel"
            f"{', or --max-value' if image.mode == 'I' else ''}"
        )
    if image.has_transparency_data:
        return image.convert("RGBA") if rules.alpha_background is None else _compose(image, rules.alpha_background)
    if rules.alpha_background is None and image.mode == "RGB" and _tiff_tag(image, _TIFF_SAMPLES_PER_PIXEL) > 3:
        raise UserError("its fourth channel is not declared as alpha, wanted 2 as TIFF's ExtraSamples, or PNG")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def white_value(image: Image.Image, rules: PixelRules) -> int | None:
    """Value that is white in a grey image of more than 8 bits; None if the image is not one, or of unknown range."""
    is_deep = image.mode.startswith("I;16")
    if not is_deep and image.mode != "I":
        return None
    if rules.max_value:
        return rules.max_value
    if not is_deep:
        return _16_BIT_MAX if image.format == "PPM" else None  # Pillow scales a PGM file by the maximum it states
    stated = _tiff_tag(image, _TIFF_MAX_SAMPLE_VALUE) or 2 ** min(16, _tiff_tag(image, _TIFF_BITS_PER_SAMPLE)) - 1
    return stated if _8_BIT_MAX < stated <= _16_BIT_MAX else _16_BIT_MAX


def _tiff_tag(image: Image.Image, number: int) -> int:
    """First value of a TIFF tag, 0 if the image has none."""
    tags: Any = getattr(image, "tag_v2", {})
    tag = tags.get(number)
    return int(tag[0] if isinstance(tag, tuple) else tag or 0)


def uses_little_of_its_range(image: Image.Image, rules: PixelRules) -> int | None:
    """Largest value of a deep grey image that stays below 1/8 of its range; None of others, and of a black image."""
    white = white_value(image, rules)
    if white is None:
        return None
    largest = int(np.asarray(image).max())
    return largest if 0 < largest < (white + 1) // 8 else None


def _compose(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Put a picture with transparency on a colour."""
    is_grey = image.mode in ("1", "L", "LA") and len(set(background)) == 1
    canvas = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(canvas, image.convert("RGBA")).convert("L" if is_grey else "RGB")
