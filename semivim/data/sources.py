"""Where images come from: one indexable view on timm's datasets, plain folders and embedded digits."""

import os
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from timm.data import ImageDataset, create_dataset
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils.misc import natural_key
from torchvision.datasets import DatasetFolder

from semivim.data.label_split import UNKNOWN
from semivim.data.wds_shards import index_shards

# What Pillow raises on files that are not, or no longer, images; a decompression bomb is no OSError.
_DECODING_ERRORS = (OSError, SyntaxError, EOFError, ValueError, struct.error, Image.DecompressionBombError)

_ITERABLE_PREFIXES = ("hfids/", "tfds/")
_WORKING_SOURCES = (
    "a folder or .tar with one sub-folder a class, 'torch/<name>', 'hfds/<name>', 'wds/<name>', 'embedded/digits'"
)


class UnreadableImageError(RuntimeError):
    """An image that cannot be decoded; the message names it."""


class ImageSource:
    """Images by index, with a label each.

    Args:
        read: Gives the image of an index, decoded or not.
        labels: Class of each image, ``(n,)``; -1 where unknown.
        class_names: Names of the classes, in the order of their labels; None where the format has none.
        names: Unique name of each image, a path relative to ``root`` for files; None where images have no names.
        root: Folder that names are relative to.
    """

    def __init__(
        self,
        read: Callable[[int], Image.Image],
        labels: Sequence[int] | np.ndarray,
        class_names: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        root: str | None = None,
    ) -> None:
        self.read = read
        self.labels = np.asarray(labels, dtype=np.int64)
        self.class_names = None if class_names is None else list(class_names)
        self.names = None if names is None else list(names)
        self.root = root

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of named classes, else one more than the largest label."""
        return len(self.class_names) if self.class_names else int(self.labels.max(initial=UNKNOWN)) + 1

    def describe(self, index: int) -> str:
        """Name an image in a message."""
        return f"image {index}" if self.names is None else os.path.join(self.root or "", self.names[index])

    def image(self, index: int) -> Image.Image:
        """Decode one image.

        Raises:
            UnreadableImageError: If the file is missing, not an image, truncated, or over Pillow's size limit.
        """
        try:
            image = self.read(index)
            image.load()
        except _DECODING_ERRORS as error:
            raise UnreadableImageError(f"{self.describe(index)} is unreadable: {error}") from error
        return image


def open_source(
    dataset: str, data_dir: str | None = None, split: str = "train", num_classes: int | None = None, **options: Any
) -> ImageSource:
    """Open a data set by timm's name for it, or ``embedded/digits``.

    Args:
        dataset: '' or 'folder' for class folders, 'torch/<name>', 'hfds/<name>', 'wds/<name>' (shards in
            ``data_dir``), 'embedded/digits'.
        data_dir: Root of the data; a sub-folder named after the split is used where there is one.
        split: Name of the split.
        num_classes: Number of classes that labels must stay below; not checked if None.
        **options: More of timm's ``create_dataset`` arguments (class_map, download, ...).

    Raises:
        ValueError: If the source cannot be read by index, is missing or empty, or has labels out of range.
    """
    if dataset == "embedded/digits":
        source = _open_digits(split)
    elif dataset.startswith("embedded/"):
        raise ValueError(f"dataset {dataset!r} is not embedded; wanted 'embedded/digits'")
    else:
        source = _open_timm(dataset, data_dir, split, **options)
    if len(source) == 0:
        raise ValueError(f"dataset {dataset!r}, split {split!r}: no images in {data_dir!r}")
    if num_classes is not None and source.num_classes > num_classes:
        raise ValueError(
            f"num_classes is {num_classes}, but dataset {dataset!r} has {source.num_classes} classes (split {split!r})"
        )
    return source


def check_sources(source: ImageSource, val_source: ImageSource, val_split: str) -> None:
    """Refuse validation images that are training images, or whose labels mean other classes.

    Raises:
        ValueError: If the validation folder holds the training folder (timm takes the root where a split has no folder
            of its own), or the class names differ; the message names the first that does.
    """
    if source.root and val_source.root:
        train, val = (os.path.realpath(s.root or "") for s in (source, val_source))
        if os.path.commonpath([train, val]) == val:
            raise ValueError(f"no validation images: split {val_split!r} has no folder of its own below {val}")
    ours, theirs = source.class_names, val_source.class_names
    if ours and theirs and ours != theirs:
        odd = sorted(set(ours) ^ set(theirs)) or [a for a, b in zip(ours, theirs, strict=True) if a != b]
        raise ValueError(
            f"training has {len(ours)} classes and validation {len(theirs)}, the first that differs is {odd[0]!r}"
        )


def open_unlabelled_folder(root: str) -> ImageSource:
    """Find every image below a folder; sub-folders mean nothing and no label is known.

    Raises:
        ValueError: If the folder is missing or holds no image.
    """
    if not os.path.isdir(root):
        raise ValueError(f"unlabelled folder {root!r} is not a directory")
    extensions = get_img_extensions(as_set=True)
    names = [
        os.path.relpath(os.path.join(folder, file), root)
        for folder, _, files in os.walk(root, followlinks=True)
        for file in files
        if os.path.splitext(file)[1].lower() in extensions
    ]
    if not names:
        raise ValueError(f"unlabelled folder {root!r} holds no image ({', '.join(sorted(extensions))})")
    names.sort(key=natural_key)
    return ImageSource(_FileReader(root, names), np.full(len(names), UNKNOWN), names=names, root=root)


def join_sources(first: ImageSource, second: ImageSource) -> ImageSource:
    """Append the images of one source to another's; the classes are the first one's."""
    names, root = None, None
    if first.names is not None and second.names is not None and first.root and second.root:
        root = os.path.commonpath([os.path.abspath(first.root), os.path.abspath(second.root)])
        names = [
            os.path.relpath(os.path.join(source.root or "", name), root)
            for source in (first, second)
            for name in source.names or ()
        ]
    labels = np.concatenate([first.labels, second.labels])
    return ImageSource(_JoinedReader(first, second), labels, first.class_names, names, root)


def select_images(source: ImageSource, positions: np.ndarray, labels: np.ndarray | None = None) -> ImageSource:
    """Keep some images of a source, in the given order.

    Args:
        source: Where the images are.
        positions: The images to keep, ``(n,)``.
        labels: Their classes, ``(n,)``; the source's where None or -1.
    """
    kept = source.labels[positions]
    if labels is not None:
        kept = np.where(labels == UNKNOWN, kept, labels)
    names = None if source.names is None else [source.names[position] for position in positions]
    return ImageSource(_SelectedReader(source, positions), kept, source.class_names, names, source.root)


class _FileReader:
    def __init__(self, root: str, names: Sequence[str]) -> None:
        self.root, self.names = root, names

    def __call__(self, index: int) -> Image.Image:
        with open(os.path.join(self.root, self.names[index]), "rb") as file:
            image = Image.open(file)
            image.load()
        return image


class _JoinedReader:
    def __init__(self, first: ImageSource, second: ImageSource) -> None:
        self.first, self.second = first, second

    def __call__(self, index: int) -> Image.Image:
        n = len(self.first)
        return self.first.read(index) if index < n else self.second.read(index - n)


class _SelectedReader:
    def __init__(self, source: ImageSource, positions: np.ndarray) -> None:
        self.source, self.positions = source, positions

    def __call__(self, index: int) -> Image.Image:
        return self.source.read(int(self.positions[index]))


class _TimmReader:
    """timm's readers without ImageDataset, which puts the next image in the place of one it cannot read."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __call__(self, index: int) -> Image.Image:
        file, *_ = self.reader[index]
        with file:
            image = Image.open(file)
            image.load()
        return image


class _PairReader:
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __call__(self, index: int) -> Image.Image:
        return self.dataset[index][0]


class _ArrayReader:
    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def __call__(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])


def _open_timm(dataset: str, data_dir: str | None, split: str, **options: Any) -> ImageSource:
    if dataset.lower().startswith(_ITERABLE_PREFIXES):
        raise ValueError(
            f"dataset {dataset!r} is a stream: a label split needs images by index; wanted {_WORKING_SOURCES}"
        )
    needs_folder = not dataset.lower().startswith("hfds/") and not (data_dir and options.get("download"))
    if needs_folder and not os.path.exists(data_dir or ""):
        raise ValueError(f"data_dir {data_dir!r} does not exist (dataset {dataset!r})")
    if dataset.lower().startswith("wds/"):
        read, labels, names = index_shards(data_dir or "", split, options.get("input_key"), options.get("target_key"))
        return ImageSource(read, labels, names=names)
    try:
        opened = create_dataset("" if dataset == "folder" else dataset, root=data_dir, split=split, **options)
    except (AssertionError, ImportError, OSError, RuntimeError) as error:
        raise ValueError(f"dataset {dataset!r} in data_dir {data_dir!r}, split {split!r}: {error}") from error
    if not isinstance(opened, ImageDataset):
        return _from_torchvision(dataset, opened)
    reader = opened.reader
    if isinstance(reader, ReaderImageFolder):
        source = _from_class_folders(reader.samples, reader.class_to_idx, reader.root)
        if not options.get("class_map"):
            _refuse_empty_folders(source, reader.root)
        return source
    if isinstance(reader, ReaderImageInTar):
        class_names = sorted(reader.class_name_to_idx, key=reader.class_name_to_idx.get)
        return ImageSource(_TimmReader(reader), reader.targets, class_names, reader.filenames(), reader.root)
    labels = [UNKNOWN if label is None else label for label in reader.iter_targets()]  # Hugging Face
    return ImageSource(_TimmReader(reader), labels, sorted(reader.class_to_idx, key=reader.class_to_idx.get))


def _from_class_folders(samples: Sequence[tuple[str, int]], class_to_idx: dict[str, int], root: str) -> ImageSource:
    """Images directly in the root belong to no class: timm gives them a class with an empty name, the first one."""
    shift = 1 if "" in class_to_idx else 0
    names = [os.path.relpath(path, root) for path, _ in samples]
    labels = [label - shift for _, label in samples]
    class_names = sorted(class_to_idx, key=lambda name: class_to_idx[name])[shift:]
    return ImageSource(_FileReader(root, names), labels, class_names or None, names, root)


def _refuse_empty_folders(source: ImageSource, root: str) -> None:
    """A class folder without images would silently shift the labels of those after it."""
    folders = {name.split(os.sep, 1)[0] for name in source.names or () if os.sep in name}
    with os.scandir(root) as entries:
        empty = sorted(entry.name for entry in entries if entry.is_dir() and entry.name not in folders)
    empty = [name for name in empty if not name.startswith(".")]
    if empty and folders:
        raise ValueError(f"class folders without an image in {root!r}: {', '.join(empty[:10])}")


def _from_torchvision(dataset: str, opened: Any) -> ImageSource:
    if isinstance(opened, DatasetFolder):
        return _from_class_folders(opened.samples, opened.class_to_idx, str(opened.root))
    labels = getattr(opened, "targets", getattr(opened, "labels", None))
    if labels is None:
        raise ValueError(f"dataset {dataset!r} gives no list of labels; wanted {_WORKING_SOURCES}")
    return ImageSource(_PairReader(opened), labels, getattr(opened, "classes", None))


_DIGITS_TEST_PER_CLASS = 50
_DIGITS_PX = 32


def _open_digits(split: str) -> ImageSource:
    """Open scikit-learn's 8x8 digits, 1,297 to train on and 50 of each class to test on, drawn once and for all.

    The digits are enlarged here rather than by the views: crops of an 8-pixel image know only a handful of positions.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("dataset 'embedded/digits' needs scikit-learn: pip install 'semivim[demo]'") from error
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    rank = np.empty(len(order), dtype=np.int64)  # of an image among those of its class, in random order
    for label in range(10):
        members = order[digits.target[order] == label]
        rank[members] = np.arange(len(members))
    if split in ("train", "training"):
        chosen = np.flatnonzero(rank >= _DIGITS_TEST_PER_CLASS)
    elif split in ("val", "valid", "validation", "test", "eval"):
        chosen = np.flatnonzero(rank < _DIGITS_TEST_PER_CLASS)
    else:
        raise ValueError(f"split {split!r} of 'embedded/digits' does not exist; wanted 'train' or 'validation'")
    small = (digits.images[chosen] * (255 / 16)).round().astype(np.uint8)
    size = (_DIGITS_PX, _DIGITS_PX)
    pixels = np.stack([np.asarray(Image.fromarray(digit).resize(size, Image.Resampling.BICUBIC)) for digit in small])
    return ImageSource(_ArrayReader(pixels), digits.target[chosen], [str(label) for label in range(10)])
