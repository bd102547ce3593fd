"""Sources beside each other: what they share, several joined, or some images of one."""

import os
from collections.abc import Callable

import numpy as np
from PIL import Image

from semivim.data.sources import ImageSource
from semivim.utils.user_error import UserError


def check_sources(
    source: ImageSource, val_source: ImageSource | None, val_split: str, num_classes: int | None = None
) -> None:
    """Refuse validation images that are training images, and labels that mean other classes or none.

    Files are the same where their folder is, links to folders resolved; images without names are where all labels and
    the first image are.

    Args:
        source: The training set, or other images to train on.
        val_source: The validation set; None where it is held out of ``source``.
        val_split: Name of the validation split.
        num_classes: Number of classes that labels must stay below; those of ``source`` if None.

    Raises:
        UserError: With the folder that both hold, the first class that differs, or the label that is out of range.
    """
    if val_source:
        refuse_shared(source, val_source, val_split)
    ours, theirs = source.class_names, val_source.class_names if val_source else None
    if ours and theirs and ours != theirs:
        odd = sorted(set(ours) ^ set(theirs)) or [a for a, b in zip(ours, theirs, strict=True) if a != b]
        raise UserError(
            f"training has {len(ours)} classes and validation {len(theirs)}, the first that differs is {odd[0]!r}"
        )
    wanted = num_classes or source.num_classes
    if wanted == 0:
        raise UserError(
            "training images have no classes: wanted a folder for each, or --num-classes and --labeled-list"
        )
    for role, part in (("training", source), ("validation", val_source or source)):
        worst = int(part.labels.argmax())
        if part.labels[worst] >= wanted:
            label, image = part.labels[worst], part.describe(worst)
            raise UserError(f"{role} label {label} of {image} is out of range for --num-classes {wanted}")


def refuse_shared(source: ImageSource, val_source: ImageSource, val_split: str) -> None:
    """Raise UserError where validation images are training images (see :func:`check_sources`)."""
    if shared := _shared_images(source, val_source):
        raise UserError(f"images to train on are validation images too: split {val_split!r} shares {shared}")


def join_sources(first: ImageSource, second: ImageSource) -> ImageSource:
    """Append the images of one source to another's; the classes and the rules for pixels are the first one's.

    Raises:
        UserError: If they have images in common, which would count twice.
    """
    if shared := _shared_images(first, second):
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


def _shared_images(first: ImageSource, second: ImageSource) -> str:
    """Describe the images that two sources share, '' if none."""
    if first.names is None and second.names is None:
        same = np.array_equal(first.labels, second.labels) and first.image(0) == second.image(0)
        return f"all its {len(second):,} images" if same else ""
    return min(_real_folders(first) & _real_folders(second), default="")


def _real_folders(source: ImageSource) -> set[str]:
    folders = {os.path.dirname(name) for name in source.names or ()}
    return {os.path.realpath(os.path.join(source.root or "", folder)) for folder in folders}


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
