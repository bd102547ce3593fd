"""Images whose pixels tell which they are."""

import numpy as np
from PIL import Image

from semivim.data.label_split import complete_split
from semivim.data.sources import ImageSource
from semivim.data.views import View

GREY = {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.25,)}
RANDAUGMENT = "rand-m9-mstd0.5-inc1"


class Pictures:
    """Images whose grey value is their position; some cannot be read."""

    def __init__(self, size=(20, 16), unreadable=()):
        self.size, self.unreadable = size, unreadable

    def __call__(self, index):
        if index in self.unreadable:
            raise OSError("image file is truncated")
        return Image.new("L", self.size, index)


def numbered(num_labelled=7, num_unlabelled=30, unreadable=()):
    """A source of pictures of two classes in turn, the first ones labelled."""
    n = num_labelled + num_unlabelled
    source = ImageSource(Pictures(unreadable=unreadable), np.arange(n) % 2)
    return source, complete_split(source.labels, 2, np.arange(num_labelled))


def plain(**changes):
    """A view that leaves grey values alone."""
    return View((1, 8, 8), (0.0,), (1.0,), no_aug=True, **changes)


def shown(images):
    """Positions of plainly viewed pictures."""
    return (images[:, 0, 0, 0] * 255).round().int().tolist()
