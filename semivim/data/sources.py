"""Image sources: access by index to timm's datasets, plain folders and scikit-learn's digits."""

import io
import logging
import os
import pickle
import struct
import tarfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset
from timm.data.readers.class_map import load_class_map
from timm.utils.misc import natural_key
from torchvision.datasets import STL10

from semivim.data.embedded import PhotoCrops, read_digits
from semivim.data.image_files import classes_of_files, file_order, find_image_files, is_hidden
from semivim.data.label_split import UNKNOWN
from semivim.data.tar_files import index_tar
from semivim.data.wds_shards import ShardReader, index_shards
from semivim.hub.hub_session import hub_session, is_hub_error
from semivim.utils.model_options import MAX_CLASSES
from semivim.utils.pixels import DEFAULT_RULES, PixelRules, refuse_extreme_shape, to_8_bit, uses_little_of_its_range
from semivim.utils.user_error import UserError, did_you_mean, did_you_mean_file

_logger = logging.getLogger(__name__)

# What Pillow raises on a missing, damaged or oversized image (DecompressionBombError is not an OSError).
_DECODING_ERRORS = (
    OSError, SyntaxError, EOFError, LookupError, TypeError, ValueError, struct.error, Image.DecompressionBombError,
)  # fmt: skip

# What timm's readers raise on unusable data, class maps, keys and options.
_OPENING_ERRORS = (AssertionError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError) + (
    pickle.UnpicklingError,
    tarfile.TarError,
)

_ITERABLE_PREFIXES = ("hfids/", "tfds/")
_WORKING_SOURCES = (
    "'' (a folder or .tar with one sub-folder a class), 'torch/<name>', 'hfds/<name>', 'wds/<name>', "
    "'embedded/digits', 'embedded/photos' (no labels)"
)
# What a misspelt name may have meant: those of the Hub and of a folder of shards are not known here.
_KNOWN_NAMES = ("embedded/digits", "embedded/photos") + (
    "torch/cifar10", "torch/cifar100", "torch/fashion_mnist", "torch/folder", "torch/image_folder", "torch/imagenet",
    "torch/inaturalist", "torch/kmnist", "torch/mnist", "torch/places365", "torch/qmnist", "torch/stl10",
)  # fmt: skip
# Options of timm that each kind of data set reads; timm ignores the others, or fails on them.
_OPTIONS: dict[str, set[str]] = {
    "": {"class_map", "input_key"},
    "torch": {"download"},
    "hfds": {"class_map", "download", "input_key", "target_key", "trust_remote_code"},
    "wds": {"input_key", "target_key"},
    "embedded": set(),
}
_TRAIN_SPLITS = ("train", "training")
_VAL_SPLITS = ("val", "valid", "validation", "eval", "evaluation")


class UnreadableImageError(UserError):
    """An image that cannot be decoded; the message names it."""


class ImageSource:
    """Images by index, with a label each.

    Args:
        read: Returns the image at an index, decoded or not.
        labels: Class of each image, ``(n,)``; -1 where unknown.
        class_names: Names of the classes, in the order of their labels; None where the format has none.
        names: Unique name of each image, a path relative to ``root`` for files; None where images have no names.
        root: Folder that names are relative to.
        rules: How pixels become 8 bits.

    Attributes:
        least_side: A JPEG file is decoded at 1/2, 1/4 or 1/8 of its size where both its sides stay at least this long,
            which takes a fraction of time and memory; None decodes at full size.

    Raises:
        UserError: If the labels are not one whole number an image.
    """

    def __init__(
        self,
        read: Callable[[int], Image.Image],
        labels: Sequence[int] | np.ndarray,
        class_names: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        root: str | None = None,
        rules: PixelRules = DEFAULT_RULES,
    ) -> None:
        self.read = read
        self.rules = rules
        self._range_said = _range_said()  # travels to worker processes
        given = np.asarray(labels)
        if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
            raise UserError(
                f"labels must be one whole number an image, got {given.dtype} of shape {given.shape}; "
                "--target-key names another column"
            )
        self.labels = given.astype(np.int64)
        self.class_names = None if class_names is None else list(class_names)
        self.names = None if names is None else list(names)
        self.root = root
        self.least_side: int | None = None
        self._warned: set[tuple[int, str]] = set()

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
        """Decode one image, to 8 bits of grey ('L'), of each colour ('RGB'), or of each colour and alpha ('RGBA').

        Raises:
            UnreadableImageError: If the file is missing, not an image, truncated, over Pillow's size limit, or of a
                pixel format that has no 8-bit equivalent.
        """
        try:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                with self.read(index) as image:
                    refuse_extreme_shape(image)
                    if self.least_side:
                        image.draft(None, (self.least_side, self.least_side))
                    image.load()
                    self._watch_range(index, image)
                    image = to_8_bit(image, self.rules)
            self._name_warnings(index, [str(warning.message) for warning in found])
        except _DECODING_ERRORS as error:
            raise UnreadableImageError(f"{self.describe(index)} is unreadable: {error}") from error
        return image

    def _name_warnings(self, index: int, messages: Sequence[str]) -> None:
        """Log once what Pillow warns of, with the file that it does not name."""
        for message in messages:
            if (index, message) not in self._warned:
                self._warned.add((index, message))
                _logger.warning("%s: %s", self.describe(index), " ".join(message.split()))

    def _watch_range(self, index: int, image: Image.Image) -> None:
        """Say once that an image is darker than its format lets it be, as 12 bits in a 16-bit file are."""
        if self._range_said or (largest := uses_little_of_its_range(image, self.rules)) is None:
            return
        self._range_said.fill_(True)
        _logger.warning(
            "%s uses under 1/8 of its range: its largest value is %d; state the value that is white (--max-value)",
            self.describe(index),
            largest,
        )


def open_source(
    dataset: str,
    data_dir: str | None = None,
    split: str = "train",
    num_classes: int | None = None,
    rules: PixelRules = DEFAULT_RULES,
    is_whole: bool = False,
    needs_labels: bool = True,
    **options: Any,
) -> ImageSource:
    """Open a data set by timm's name for it, or ``embedded/digits``.

    Args:
        dataset: '' or 'folder' for class folders, 'torch/<name>', 'hfds/<name>', 'wds/<name>' (shards in
            ``data_dir``), 'embedded/digits'.
        data_dir: Root of the data, a folder that holds one folder a split, or a .tar.
        split: Name of the split, with timm's synonyms for folders; '.' is ``data_dir`` itself.
        num_classes: Number of classes that labels must stay below; not checked if None.
        rules: How pixels become 8 bits.
        is_whole: Validation images come from this source too: a folder without folders of splits is itself the split.
        needs_labels: Whether a data set of Hugging Face without a column of labels is refused.
        **options: More of timm's ``create_dataset`` arguments (class_map, download, ...).

    Raises:
        UserError: If the source cannot be read by index, is missing or empty, does not read one of the options, or has
            labels out of range.
    """
    kind = _kind(dataset)
    for name in sorted(set(options) - _OPTIONS[kind]):
        given = f"--{'dataset-' if name in ('download', 'trust_remote_code') else ''}{name.replace('_', '-')}"
        raise UserError(f"{given} {options[name]!r} is not read with dataset {dataset!r}")
    if kind == "embedded":
        source = _open_embedded(dataset, data_dir, split)
    elif dataset.lower() == "torch/stl10":
        source = _open_stl10(data_dir or "", split, bool(options.get("download")))
    else:
        if is_whole and _is_flat(data_dir or ""):
            split = "."
        source = _open_timm(kind, dataset, data_dir, split, needs_labels, **options)
    source.rules = rules
    if source.num_classes > MAX_CLASSES:
        worst = source.describe(int(source.labels.argmax()))
        raise UserError(f"{worst}: label {source.labels.max()} is over {MAX_CLASSES - 1:,}, the largest that is read")
    if len(source) == 0:
        raise UserError(f"dataset {dataset!r}, split {split!r}: no images in {data_dir!r}")
    if num_classes is not None and source.num_classes > num_classes:
        raise UserError(
            f"--num-classes is {num_classes}, but dataset {dataset!r}, split {split!r} has {source.num_classes} classes"
        )
    return source


def open_unlabelled_folder(root: str) -> ImageSource:
    """Find every image below a folder; sub-folders mean nothing and no label is known.

    Hidden files and folders are left out, and a folder that links lead to again counts once.

    Raises:
        UserError: If the folder is missing or holds no image.
    """
    if not os.path.isdir(root):
        raise UserError(f"--unlabeled-dir {root!r} is not a directory{did_you_mean_file(root)}")
    names = find_image_files(root).names
    if not names:
        raise UserError(f"folder {root!r} holds no image that Pillow reads")
    return ImageSource(_FileReader(root, names), np.full(len(names), UNKNOWN), names=names, root=root)


@cache
def _range_said() -> torch.Tensor:
    """Whether a picture of little range was named already, ``(1,)``; one flag for this process and its workers."""
    return torch.zeros(1, dtype=torch.bool).share_memory_()


class _FileReader:
    def __init__(self, root: str, names: Sequence[str]) -> None:
        self.root, self.names = root, names

    def __call__(self, index: int) -> Image.Image:
        return Image.open(os.path.join(self.root, self.names[index]))  # decoded where the size is known


class _TimmReader:
    """A reader of timm without its ImageDataset, which replaces an unreadable image by the next one."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __call__(self, index: int) -> Image.Image:
        file, *_ = self.reader[index]
        with file:
            return Image.open(io.BytesIO(file.read()))  # decoded where the size is known


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


def _kind(dataset: str) -> str:
    """Prefix of a data set's name, '' for folders; an unknown name is refused, which timm would take for a folder."""
    if dataset in ("", "folder"):
        return ""
    if dataset.lower().startswith(_ITERABLE_PREFIXES):
        raise UserError(
            f"dataset {dataset!r} is a stream: a label split needs images by index; wanted {_WORKING_SOURCES}"
        )
    prefix, slash, _ = dataset.partition("/")
    if not (prefix and slash and prefix.lower() in _OPTIONS):
        raise UserError(f"dataset {dataset!r} is not known; wanted {_WORKING_SOURCES}{_did_you_mean_dataset(dataset)}")
    return prefix.lower()


def _did_you_mean_dataset(name: str) -> str:
    return "" if name.lower() in _KNOWN_NAMES else did_you_mean(name.lower(), _KNOWN_NAMES)


def _split_folder(data_dir: str, split: str) -> str:
    """Folder of a split; timm would fall back to ``data_dir``, and a typo would train on validation images."""
    for name in (split, *next((names for names in (_TRAIN_SPLITS, _VAL_SPLITS) if split in names), ())):
        if os.path.exists(folder := os.path.join(data_dir, name)):
            return data_dir if name == "." else folder
    subfolders = _subfolders(data_dir)
    raise UserError(
        f"split {split!r} has no folder of its own in --data-dir {data_dir!r}, which holds "
        f"{', '.join(subfolders[:10]) or 'no folder'}{', ...' if len(subfolders) > 10 else ''}; where its folders are "
        "classes, train_ssl.py --val-fraction 0.1 or train_arm.py --unlabeled-dir holds validation images out"
        f"{did_you_mean(split, subfolders)}"
    )


def _subfolders(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _is_flat(data_dir: str) -> bool:
    """Whether a folder has no folder of any split."""
    return os.path.isdir(data_dir) and not {*_TRAIN_SPLITS, *_VAL_SPLITS, "test"} & set(_subfolders(data_dir))


@contextmanager
def _opening(dataset: str, data_dir: str | None, split: str) -> Iterator[None]:
    """Turn what timm, torchvision and datasets raise on unusable data into one line."""
    with hub_session(dataset.partition("/")[2]):
        try:
            yield
        except _OPENING_ERRORS as error:
            if is_hub_error(error):
                raise
            reason = f"{type(error).__name__} {error}" if isinstance(error, LookupError) else error
            hint = _did_you_mean_dataset(dataset) if dataset.lower().startswith("torch/") else ""
            raise UserError(
                f"dataset {dataset!r} in --data-dir {data_dir!r}, split {split!r}: {reason}{hint}"
            ) from error


def _open_timm(
    kind: str, dataset: str, data_dir: str | None, split: str, needs_labels: bool, **options: Any
) -> ImageSource:
    needs_folder = kind != "hfds" and not (data_dir and options.get("download"))
    if needs_folder and not data_dir:
        raise UserError(f"dataset {dataset!r} needs --data-dir")
    if data_dir and needs_folder and not os.path.exists(data_dir):
        raise UserError(f"--data-dir {data_dir!r} does not exist (dataset {dataset!r}){did_you_mean_file(data_dir)}")
    if kind == "wds":
        read, labels, names = index_shards(data_dir or "", split, options.get("input_key"), options.get("target_key"))
        return ImageSource(read, labels, names=names, root=data_dir)
    if (not kind or dataset.lower() in ("torch/folder", "torch/image_folder")) and os.path.isdir(data_dir or ""):
        return _open_folder(_split_folder(data_dir or "", split), **options)
    if not kind and "input_key" not in options:
        return _open_tar(data_dir or "", **options)
    with _opening(dataset, data_dir, split):
        opened = create_dataset(dataset, root=data_dir, split=split, search_split=False, **options)
        reader: Any = opened.reader if isinstance(opened, ImageDataset) else None
        if kind == "hfds" and not (needs_labels or "target_key" in options):
            _allow_no_labels(reader)
        targets = list(reader.iter_targets()) if hasattr(reader, "iter_targets") else []  # Hugging Face
    if reader is None:
        return _from_torchvision(dataset, opened, split)
    if targets and reader.dataset[0][reader.image_key] is None:  # datasets makes an empty column of an unknown name
        columns = ", ".join(reader.dataset.column_names)
        raise UserError(f"dataset {dataset!r} has no image in column {reader.image_key!r} (--input-key) of {columns}")
    class_to_idx = reader.class_to_idx
    if not class_to_idx and any(isinstance(target, str) for target in targets):  # a column of text, not of classes
        named = sorted({target for target in targets if target is not None}, key=file_order)
        class_to_idx = {name: label for label, name in enumerate(named)}
        targets = [class_to_idx.get(target) for target in targets]
    labels, class_names = _classes(targets, class_to_idx)
    return ImageSource(_TimmReader(reader), labels, class_names)


def _allow_no_labels(reader: Any) -> None:
    """Let timm's reader of a Hugging Face data set without a column of labels give None for each."""
    if reader.label_key not in reader.dataset.column_names:
        reader.dataset = reader.dataset.add_column(reader.label_key, [None] * len(reader.dataset))


def _open_folder(root: str, class_map: str = "", input_key: str | None = None) -> ImageSource:
    """Open class folders: the class of an image is the outermost folder below ``root`` that holds it.

    Args:
        root: Folder of a split.
        class_map: File that gives classes their labels; images of other classes are left out.
        input_key: Extensions of images, separated by ``;``.
    """
    names, repeated = find_image_files(root, input_key.lower().split(";") if input_key else None)
    if repeated:
        raise UserError(f"links below {root!r} lead to one folder of images by several ways, which would count twice")
    names, labels, class_names = _label(root, names, class_map)
    if not class_map:
        _refuse_empty_folders(root, {name for name in classes_of_files(names) if name})
    return ImageSource(_FileReader(root, names), labels, class_names, names, root)


def _open_tar(path: str, class_map: str = "") -> ImageSource:
    """Open a tar file of class folders."""
    places = index_tar(path)
    names, labels, class_names = _label(path, sorted(places, key=file_order), class_map)
    return ImageSource(ShardReader([places[name] for name in names]), labels, class_names, names, path)


def _label(root: str, names: list[str], class_map: str) -> tuple[list[str], list[int], list[str] | None]:
    """Names of the images that have a class, their labels and the classes."""
    folders = classes_of_files(names)
    if class_map:
        try:
            class_to_idx = load_class_map(class_map, root)
        except _OPENING_ERRORS as error:
            hint = "" if os.path.exists(os.path.join(root, class_map)) else did_you_mean_file(class_map)
            raise UserError(f"--class-map {class_map!r}: {error}{hint}") from error
        names = [name for name, folder in zip(names, folders, strict=True) if folder in class_to_idx]
        folders = [folder for folder in folders if folder in class_to_idx]
    else:
        class_to_idx = {name: i for i, name in enumerate(sorted(set(folders), key=file_order))}
        _refuse_equal_classes(set(folders) - {""})
    deep = [name for name in names if name.count(os.sep) > 1]
    if deep:
        where, folder = os.path.dirname(deep[0]), deep[0].split(os.sep, 1)[0]
        _logger.warning("%s: %d images lie deeper: those in %r are of class %r", root, len(deep), where, folder)
    return (names, *_classes([class_to_idx[folder] for folder in folders], class_to_idx))


def _classes(targets: Iterable[int | None], class_to_idx: dict[str, int]) -> tuple[list[int], list[str] | None]:
    """Labels, and the class names in their order; None for the names if a class map merges classes or skips labels.

    Images directly in the root have no class, but timm puts them in one called '' ('.' in some tar files). A blank
    line of a class map makes that class too.
    """
    for name, index in class_to_idx.items():
        if not isinstance(index, int) or index < 0:
            raise UserError(f"--class-map gives class {name!r} the label {index!r}, wanted a whole number")
    indices = dict(class_to_idx)
    rootless = next((indices.pop(name) for name in ("", ".") if name in indices), None)
    labels = [UNKNOWN if label in (None, rootless) else label for label in targets]
    if rootless is not None:
        labels = [label - (label > rootless) for label in labels]
        indices = {name: index - (index > rootless) for name, index in indices.items()}
    names = sorted(indices, key=indices.__getitem__)
    return labels, names if names and [indices[name] for name in names] == list(range(len(names))) else None


def _refuse_equal_classes(classes: set[str]) -> None:
    """Refuse class names that tie in timm's order, so that their labels would depend on the file system."""
    for first, second in pairwise(sorted(classes, key=file_order)):
        if natural_key(first) == natural_key(second):
            raise UserError(f"classes {first!r} and {second!r} differ in case or zeros only, and would swap labels")


def _refuse_empty_folders(root: str, classes: set[str]) -> None:
    """Refuse class folders without an image, which would shift the labels of the others."""
    with os.scandir(root) as entries:
        subfolders = {entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name)}
    empty = sorted(subfolders - classes)
    if empty and classes:
        raise UserError(f"class folders without an image that Pillow reads in {root!r}: {', '.join(empty[:10])}")


def _from_torchvision(dataset: str, opened: Any, split: str) -> ImageSource:
    if getattr(opened, "train", None) is False and split not in (*_VAL_SPLITS, "test"):
        raise UserError(f"split {split!r} of {dataset!r} does not exist; wanted 'train' or 'validation'")
    labels = getattr(opened, "targets", getattr(opened, "labels", None))
    if labels is None:
        raise UserError(f"dataset {dataset!r} gives no list of labels; wanted {_WORKING_SOURCES}")
    return ImageSource(_PairReader(opened), labels, getattr(opened, "classes", None))


def _open_stl10(data_dir: str, split: str, download: bool) -> ImageSource:
    """Open STL-10, whose 100,000 images without labels belong to the training split."""
    parts = dict.fromkeys(_TRAIN_SPLITS, "train+unlabeled") | dict.fromkeys((*_VAL_SPLITS, "test"), "test")
    if split not in parts:
        raise UserError(f"split {split!r} of 'torch/stl10' does not exist; wanted 'train' or 'validation'")
    with _opening("torch/stl10", data_dir, split):
        opened = STL10(data_dir, parts[split], download=download)
    return ImageSource(_PairReader(opened), opened.labels.astype(np.int64), opened.classes)


def _open_embedded(dataset: str, data_dir: str | None, split: str) -> ImageSource:
    if dataset not in ("embedded/digits", "embedded/photos"):
        raise UserError(f"dataset {dataset!r} is not embedded; wanted 'embedded/digits' or 'embedded/photos'")
    if data_dir:
        raise UserError(f"--data-dir {data_dir!r} is not read with dataset {dataset!r}")
    if split not in (*_TRAIN_SPLITS, *_VAL_SPLITS, "test"):
        raise UserError(f"split {split!r} of {dataset!r} does not exist; wanted 'train' or 'validation'")
    if dataset == "embedded/photos":
        crops = PhotoCrops(split in _TRAIN_SPLITS)
        return ImageSource(crops, np.full(len(crops), UNKNOWN))
    pixels, labels = read_digits(split in _TRAIN_SPLITS)
    return ImageSource(_ArrayReader(pixels), labels, [str(label) for label in range(10)])
