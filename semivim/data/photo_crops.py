"""Crops of scikit-learn's two sample photographs, to train on without any data set: a temple and a flower."""

from functools import cache

import numpy as np
from PIL import Image

from semivim.utils.user_error import UserError

SIDE = 96  # pixels of a crop
STEP = 16  # pixels from a crop to the next
# The right end of each photograph is held out: no pixel is in a crop to train on and in one to evaluate.
HELD_OUT = 128  # pixels


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


@cache
def _photos() -> list[np.ndarray]:
    """Both photographs, ``(rows, columns, 3)``, uint8."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise UserError("dataset 'embedded/photos' needs scikit-learn: pip install 'semivim[demo]'") from error
    return load_sample_images().images
