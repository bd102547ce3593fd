"""Sources made of others: several joined, or some images of one."""

import os
from collections.abc import Callable

import numpy as np
from PIL import Image

from semivim.data.sources import ImageSource, shared_images
from semivim.utils.user_error import UserError


def join_sources(first: ImageSource, second: ImageSource) -> ImageSource:
    """Append the images of one source to another's; the classes and the rules for pixels are the first one's.

    Raises:
        UserError: If they have images in common, which would count twice.
    """
    if shared := shared_images(first, second):
        raise UserError(f"unlabelled images are training images already, and would count twice: both hold {shared}")
    names, root = None, None
    if first.names is not None and second.names is not None and first.root and second.root:
        root = os.path.commonpath([os.path.abspath(first.root), os.path.abspath(second.root)])
        names = [
            os.path.relpath(os.path.join(source.root or "", name), root)
            for source in (first, second)
            for name in source.names or ()
        ]
    labels = np.concatenate([first.labels, second.labels])
    return ImageSource(_JoinedReader(first, second), labels, first.class_names, names, root, first.rules)


def select_images(source: ImageSource, positions: np.ndarray, labels: np.ndarray) -> ImageSource:
    """Some images of a source, as a source of their own.

    Args:
        source: Where they are.
        positions: Their positions, ``(n,)``.
        labels: Class of every image of the source, which takes the place of its own labels.
    """
    names = None if source.names is None else [source.names[i] for i in positions]
    read = _SelectedReader(source.read, positions)
    return ImageSource(read, labels[positions], source.class_names, names, source.root, source.rules)


class _SelectedReader:
    def __init__(self, read: Callable[[int], Image.Image], positions: np.ndarray) -> None:
        self.read, self.positions = read, positions

    def __call__(self, index: int) -> Image.Image:
        return self.read(int(self.positions[index]))


class _JoinedReader:
    def __init__(self, first: ImageSource, second: ImageSource) -> None:
        self.first, self.second = first, second

    def __call__(self, index: int) -> Image.Image:
        n = len(self.first)
        return self.first.read(index) if index < n else self.second.read(index - n)
