"""Lists of labelled or unlabelled images, in the formats that papers publish.

A list has one entry a line; its content decides the format:

* ``n04235860_14959.JPEG``: bare file names (SimCLRv2's ImageNet subsets), or paths below the root;
* ``train/n01440764/n01440764_190.JPEG 0``: path and label (ImageNet-LT);
* ``Index`` column of a .csv: indices into torchvision's order of the images (Semi-ViT, EMAN).
"""

import csv
import os
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from semivim.data.label_split import UNKNOWN, LabelSplit, complete_split
from semivim.data.sources import ImageSource
from semivim.utils.user_error import UserError, did_you_mean_file


class ListedImages(NamedTuple):
    """Images that a list names, in the order of the list."""

    positions: np.ndarray  # (n,), int64, in the source
    labels: np.ndarray  # (n,), int64, -1 where the list gives none


def split_from_lists(
    source: ImageSource,
    num_classes: int,
    labelled_list: str,
    unlabelled_list: str | None = None,
    data_dir: str | None = None,
    min_per_class: int = 1,
    include_labelled: bool = False,
) -> LabelSplit:
    """Take the labelled and the unlabelled images from lists.

    Args:
        source: The training set.
        num_classes: Number of classes.
        labelled_list: List of the labelled images.
        unlabelled_list: List of the unlabelled images; all that are not labelled if None.
        data_dir: Folder that paths in the lists may start from, besides the source's own root.
        min_per_class: 0 accepts classes without a labelled image.
        include_labelled: Use the labelled images as unlabelled ones too.

    Raises:
        UserError: If an entry is unknown, repeated, out of range or outside the root (the message names the line), or
            the split fails ``complete_split``.
    """
    lists = [read_list(path, source, num_classes, data_dir) for path in (labelled_list, unlabelled_list) if path]
    labels = source.labels.copy()
    for positions, given in lists:
        labels[positions] = np.where(given == UNKNOWN, labels[positions], given)
    unlabelled = lists[1].positions if unlabelled_list else None
    return complete_split(labels, num_classes, lists[0].positions, unlabelled, min_per_class, include_labelled)


def read_list(path: str, source: ImageSource, num_classes: int, data_dir: str | None = None) -> ListedImages:
    """Find the images that a list names.

    Args:
        path: The list.
        source: Where the images are.
        num_classes: Number of classes that labels must stay below.
        data_dir: Folder that paths in the list may start from, besides the source's own root.

    Raises:
        UserError: If the list is missing or empty, or an entry is unknown, ambiguous, repeated, out of range, outside
            the root, or contradicts the source's label; the message names list and line.
    """
    if not os.path.isfile(path):
        raise UserError(f"list {path!r} is not a file{did_you_mean_file(path)}")
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = file.read().split("\n")  # not splitlines(): a file name may hold other line separators
    except UnicodeDecodeError as error:
        raise UserError(f"list {path!r} is not UTF-8 text: {error}") from error
    entries = _indexed(path, lines, source) if _is_indexed(lines) else _named(path, lines, source, data_dir)
    seen: dict[int, int] = {}
    labels = []
    for number, position, label in entries:
        where = f"list {path!r}, line {number}"
        if position in seen:
            raise UserError(f"{where}: {source.describe(position)} is listed before, in line {seen[position]}")
        if not UNKNOWN <= label < num_classes:
            raise UserError(f"{where}: label {label} is out of range for --num-classes {num_classes}")
        known = source.labels[position]
        if UNKNOWN not in (label, known) and label != known:
            raise UserError(f"{where}: class {label}, but the data set has {source.describe(position)} as {known}")
        seen[position] = number
        labels.append(label)
    if not seen:
        raise UserError(f"list {path!r} names no image")
    return ListedImages(np.array(list(seen), dtype=np.int64), np.array(labels, dtype=np.int64))


def _is_indexed(lines: Sequence[str]) -> bool:
    return bool(lines) and "Index" in [column.strip() for column in next(csv.reader(lines[:1]), [])]


def _indexed(path: str, lines: Sequence[str], source: ImageSource) -> Iterator[tuple[int, int, int]]:
    """Yield (line, position, unknown label) of a .csv of indices into torchvision's order of the images."""
    order = np.arange(len(source))
    if source.names is not None:
        # torchvision sorts folders, then files, as text; timm puts x_9 before x_10.
        keys = [os.path.split(name) for name in source.names]
        order = np.array(sorted(range(len(source)), key=keys.__getitem__))
    rows = csv.reader(lines)
    column = [name.strip() for name in next(rows)].index("Index")
    for row in rows:
        if not any(row):
            continue
        value = row[column].strip() if column < len(row) else ""
        if not re.fullmatch(r"[+-]?\d+", value) or not 0 <= int(value) < len(order):
            raise UserError(
                f"list {path!r}, line {rows.line_num}: index {value!r} is out of range for {len(order)} images"
            )
        yield rows.line_num, int(order[int(value)]), UNKNOWN


def _named(
    path: str, lines: Sequence[str], source: ImageSource, data_dir: str | None
) -> Iterator[tuple[int, int, int]]:
    """Yield (line, position, label) of a list of file names, with labels or without."""
    if source.names is None:
        raise UserError(f"list {path!r} names files, but the images of this data set have no names; wanted 'Index'")
    find = _NameFinder(source, data_dir)
    for number, line in enumerate(lines, start=1):
        entry = line.strip()
        if not entry:
            continue
        match = re.fullmatch(r"(.+?)\s+([+-]?\d+)", entry)
        name, label = (match[1], int(match[2])) if match else (entry, UNKNOWN)
        try:
            position = find(name)
        except ValueError as error:
            raise UserError(f"list {path!r}, line {number}: {error}") from None
        yield number, position, label


class _NameFinder:
    """Positions of images by their path below the root or, for a bare file name, by that name alone."""

    def __init__(self, source: ImageSource, data_dir: str | None) -> None:
        assert source.names is not None
        self.names = source.names
        self.source_root = os.path.abspath(source.root or "")
        self.real_source_root = os.path.realpath(self.source_root)
        root = os.path.abspath(data_dir) if data_dir else self.source_root
        # A path in a list may start at the root of the data set, where the source starts at the folder of its split.
        self.prefix = os.path.relpath(self.source_root, root) + os.sep
        self.real_root = os.path.realpath(root)
        self.by_path = {name: position for position, name in enumerate(self.names)}
        self.by_file: dict[str, int] = {}
        self.ambiguous: set[str] = set()
        for position, name in enumerate(self.names):
            file = os.path.basename(name)
            if file in self.by_file:
                self.ambiguous.add(file)
            self.by_file[file] = position
        self.real_folder = lru_cache(maxsize=None)(os.path.realpath)

    def __call__(self, name: str) -> int:
        path = name.removeprefix(self.source_root + os.sep).removeprefix(self.real_source_root + os.sep)
        if os.path.isabs(path) or ".." in re.split(r"[/\\]", path):
            raise UserError(f"{name!r} is outside the root: wanted a path below {self.source_root}")
        path = os.path.normpath(path)
        position = self.by_path.get(path)
        if position is None:
            position = self.by_path.get(path.removeprefix(self.prefix))
        if position is None and os.sep not in path:
            if path in self.ambiguous:
                raise UserError(f"{name!r} is the name of several images; wanted a path below {self.source_root}")
            position = self.by_file.get(path)
        if position is None:
            raise UserError(f"{name!r} is not an image below {self.source_root}")
        self._refuse_escape(name, os.path.join(self.source_root, self.names[position]))
        return position

    def _refuse_escape(self, name: str, path: str) -> None:
        folder, file = os.path.split(path)
        real = os.path.join(self.real_folder(folder), file)
        if os.path.islink(real):
            real = os.path.realpath(real)
        if os.path.commonpath([self.real_root, real]) != self.real_root:
            raise UserError(f"{name!r} is a link to {real}, outside the root {self.real_root}")
