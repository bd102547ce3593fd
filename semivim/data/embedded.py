"""Images that scikit-learn ships, to train on without a data set: digits, photographs of a temple and of a flower."""

from functools import cache

import numpy as np
from PIL import Image

from semivim.utils.user_error import UserError

SIDE = 96  # pixels of a crop
STEP = 16  # pixels from a crop to the next
# The right end of each photograph is held out: no pixel is in a crop to train on and in one to evaluate.
HELD_OUT = 128  # pixels
DIGITS_TEST_PER_CLASS = 50
DIGITS_PX = 32


class PhotoCrops:
    """Overlapping square crops by index, the first photograph's before the second's.

    Args:
        training: Whether to take the crops to train on, or those held out.

    Raises:
        UserError: If scikit-learn is not installed.
    """

    def __init__(self, training: bool) -> None:
        self.training = training
        self.places = [
            (photo, top, left)
            for photo, pixels in enumerate(_photos())
            for top in range(0, pixels.shape[0] - SIDE + 1, STEP)
            for left in self._lefts(pixels.shape[1])
        ]

    def _lefts(self, width: int) -> range:
        if self.training:
            return range(0, width - HELD_OUT - SIDE + 1, STEP)
        return range(width - HELD_OUT, width - SIDE + 1, STEP)

    def __len__(self) -> int:
        return len(self.places)

    def __call__(self, index: int) -> Image.Image:
        """Return a crop."""
        photo, top, left = self.places[index]
        return Image.fromarray(_photos()[photo][top : top + SIDE, left : left + SIDE])


def read_digits(training: bool) -> tuple[np.ndarray, np.ndarray]:
    """Read the 8x8 digits, 1,297 to train on and 50 of each class to test on, from a fixed draw.

    The digits are enlarged here rather than by the views: an 8-pixel image has only a handful of crops.

    Args:
        training: Whether to take those to train on, or the others.

    Returns:
        Pixels, ``(n, 32, 32)``, uint8, and labels, ``(n,)``.

    Raises:
        UserError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("dataset 'embedded/digits' needs scikit-learn: pip install 'semivim[demo]'") from error
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    rank = np.empty(len(order), dtype=np.int64)  # rank of an image among those of its class, in random order
    for label in range(10):
        members = order[digits.target[order] == label]
        rank[members] = np.arange(len(members))
    chosen = np.flatnonzero((rank >= DIGITS_TEST_PER_CLASS) == training)
    small = (digits.images[chosen] * (255 / 16)).round().astype(np.uint8)
    pixels = [np.asarray(Image.fromarray(x).resize((DIGITS_PX, DIGITS_PX), Image.Resampling.BICUBIC)) for x in small]
    return np.stack(pixels), digits.target[chosen]


@cache
def _photos() -> list[np.ndarray]:
    """Both photographs, ``(rows, columns, 3)``, uint8."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise UserError("dataset 'embedded/photos' needs scikit-learn: pip install 'semivim[demo]'") from error
    return load_sample_images().images
