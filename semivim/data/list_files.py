"""Lists of labelled or unlabelled images, in the formats that papers publish.

A list has one entry a line; its content decides the format:

* ``n04235860_14959.JPEG``: bare file names (SimCLRv2's ImageNet subsets), or paths below the root;
* ``train/n01440764/n01440764_190.JPEG 0``: path and label (ImageNet-LT), parted by a space, a tab or a comma;
* ``image_id,label``: a table with a header (see ``NAME_COLUMNS`` and ``LABEL_COLUMNS``), as pandas writes it;
* ``Index`` column of a .csv: indices into torchvision's order of the images (Semi-ViT, EMAN).

Names may lack their extension, labels are numbers or names of classes, and lines that start with # are comments.
"""

import csv
import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from semivim.data.image_files import file_order, image_extensions
from semivim.data.label_split import UNKNOWN, LabelSplit, class_name, complete_split
from semivim.data.sources import ImageSource
from semivim.utils.user_error import UserError, did_you_mean_file, one_line

# Headers of the column of images and of the column of labels, in lower case; the first that a table has counts.
NAME_COLUMNS = ("image_id", "image", "image_path", "filename", "file_name", "filepath", "file", "path", "id", "name")
LABEL_COLUMNS = ("label", "class", "class_name", "target", "category", "labels")


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
    validation_list: str | None = None,
    **options: Any,
) -> LabelSplit:
    """Take the labelled, the unlabelled and the validation images from lists.

    Args:
        source: The training set.
        num_classes: Number of classes.
        labelled_list: List of the labelled images.
        unlabelled_list: List of the unlabelled images; all that are not labelled if None.
        data_dir: Folder that paths in the lists may start from, besides the source's own root.
        validation_list: List of images to hold out for evaluation; none if None.
        **options: More arguments of ``complete_split``.

    Raises:
        UserError: If an entry is unknown, repeated, out of range or outside the root (the message names the line), or
            the split fails ``complete_split``.
    """
    paths = {"labelled": labelled_list, "unlabelled": unlabelled_list, "validation": validation_list}
    lists = {role: read_list(path, source, num_classes, data_dir) for role, path in paths.items() if path}
    labels = source.labels.copy()
    for positions, given in lists.values():
        labels[positions] = np.where(given == UNKNOWN, labels[positions], given)
    unlabelled = lists["unlabelled"].positions if "unlabelled" in lists else None
    held_out = lists["validation"].positions if "validation" in lists else ()
    options |= {"validation": held_out, "describe": source.describe}
    return complete_split(labels, num_classes, lists["labelled"].positions, unlabelled, **options)


def listed_classes(path: str) -> list[str] | None:
    """Names of classes that a list gives its images, in the order of class folders; None if it gives numbers or none.

    Raises:
        UserError: If the list cannot be read.
    """
    lines = _read_lines(path)
    labels = {label for *_, label in _rows(path, lines, _has_image_extension) if label}
    return None if all(map(_is_number, labels)) else sorted(labels, key=file_order)


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
    lines = _read_lines(path)
    entries = _indexed(path, lines, source) if _is_indexed(path, lines) else _named(path, lines, source, data_dir)
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
            ours, theirs = (class_name(i, source.class_names) for i in (label, known))
            raise UserError(f"{where}: class {ours}, but the data set has {source.describe(position)} as {theirs}")
        seen[position] = number
        labels.append(label)
    if not seen:
        raise UserError(f"list {path!r} names no image")
    return ListedImages(np.array(list(seen), dtype=np.int64), np.array(labels, dtype=np.int64))


def _read_lines(path: str) -> list[str]:
    if not os.path.isfile(path):
        raise UserError(f"list {path!r} is not a file{did_you_mean_file(path)}")
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read().split("\n")  # not splitlines(): a file name may hold other line separators
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"list {path!r} is not UTF-8 text: {error}") from error


def _has_image_extension(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in image_extensions()


def _is_number(label: str) -> bool:
    return re.fullmatch(r"[+-]?\d+", label) is not None


def _is_indexed(path: str, lines: Sequence[str]) -> bool:
    return any("Index" in [cell.strip() for cell in cells] for _, cells in _cells(path, lines[:1]))


def _cells(path: str, lines: Iterable[str], before: int = 0) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, cells) of a .csv, which has ``before`` lines more above."""
    rows = csv.reader(lines)
    try:
        for cells in rows:
            yield before + rows.line_num, cells
    except csv.Error as error:
        raise UserError(f"list {path!r}, line {before + rows.line_num}: {one_line(error)}") from error


def _indexed(path: str, lines: Sequence[str], source: ImageSource) -> Iterator[tuple[int, int, int]]:
    """Yield (line, position, unknown label) of a .csv of indices into torchvision's order of the images."""
    order = np.arange(len(source))
    if source.names is not None:
        # torchvision sorts folders, then files, as text; timm puts x_9 before x_10.
        keys = [os.path.split(name) for name in source.names]
        order = np.array(sorted(range(len(source)), key=keys.__getitem__))
    rows = _cells(path, lines)
    column = [name.strip() for name in next(rows)[1]].index("Index")
    for number, row in rows:
        if not any(row):
            continue
        value = row[column].strip() if column < len(row) else ""
        if not re.fullmatch(r"[+-]?\d{1,18}", value) or not 0 <= int(value) < len(order):
            raise UserError(f"list {path!r}, line {number}: index {value!r} is out of range for {len(order)} images")
        yield number, int(order[int(value)]), UNKNOWN


def _named(
    path: str, lines: Sequence[str], source: ImageSource, data_dir: str | None
) -> Iterator[tuple[int, int, int]]:
    """Yield (line, position, label) of a list of file names, with labels or without."""
    if source.names is None:
        raise UserError(f"list {path!r} names files, but the images of this data set have no names; wanted 'Index'")
    find = _NameFinder(source, data_dir)
    for number, name, text in _rows(path, lines, find.knows):
        try:
            position = find(name)
            label = _label(text, source.class_names, int(source.labels[position])) if text else UNKNOWN
        except UserError as error:
            raise UserError(f"list {path!r}, line {number}: {error}") from None
        yield number, position, label


def _rows(path: str, lines: Sequence[str], is_name: Callable[[str], bool]) -> Iterator[tuple[int, str, str]]:
    """Yield (line, name, label, '' for none) of a list of file names.

    Args:
        path: The list, for errors.
        lines: Its lines.
        is_name: Whether a text is the name of an image, which decides where a line without a header is parted.
    """
    columns: tuple[int, int | None] | None = None
    first = True
    for number, line in enumerate(lines, start=1):
        entry = line.strip()
        if not entry or entry.startswith("#"):
            continue
        cells = [cell.strip() for cell in next(_cells(path, [entry], number - 1))[1]]
        if first:
            first = False
            columns = _columns(path, number, cells)
            if columns:
                continue
        if columns:
            name_column, label_column = columns
            if max(name_column, label_column or 0) >= len(cells):
                raise UserError(
                    f"list {path!r}, line {number}: wanted a cell for each column of the header, got {entry!r}"
                )
            yield number, cells[name_column], "" if label_column is None else cells[label_column]
            continue
        parted = re.fullmatch(r"(.+?)\s+([+-]?\d+)", entry) or re.fullmatch(r"(.+?)\s+(\S+)", entry)
        ways = [(parted[1], parted[2])] if parted and _is_number(parted[2]) else []
        ways += [(cells[0], cells[1])] if len(cells) == 2 else []
        ways += [(entry, "")]
        ways += [(parted[1], parted[2])] if parted else []
        yield number, *next((way for way in ways if is_name(way[0])), ways[0])


def _columns(path: str, number: int, cells: Sequence[str]) -> tuple[int, int | None] | None:
    """Columns of names and labels (None for none) if the cells are a header, else None."""
    known = [cell.lower() for cell in cells]
    names, labels = ([known.index(name) for name in group if name in known] for group in (NAME_COLUMNS, LABEL_COLUMNS))
    if names:
        return names[0], labels[0] if labels else None
    if labels and len(cells) > 1:
        wanted = ", ".join(NAME_COLUMNS)
        raise UserError(f"list {path!r}, line {number}: no column of images among {', '.join(cells)}: wanted {wanted}")
    return None


def _label(text: str, class_names: Sequence[str] | None, known: int) -> int:
    """Class that a label means, by its number or by its name; ``known`` is what the data set says, -1 for nothing."""
    names = list(class_names or [])
    number = re.fullmatch(r"([+-]?\d{1,18})(\.0)?", text)  # pandas makes 3.0 of 3 where a label is missing
    meanings = ([int(number[1])] if number else []) + ([names.index(text)] if text in names else [])
    if not meanings:
        near = difflib.get_close_matches(text, names, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"{text!r} is not a class{hint}: wanted one of {', '.join(names[:10]) or 'the numbers from 0'}")
    if known in meanings:
        return known
    if len(set(meanings)) > 1:
        raise UserError(f"{text!r} is the name of one class and the number of another: wanted names alone")
    return meanings[0]


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
            stem = os.path.splitext(name)[0]
            file, file_stem = os.path.basename(name), os.path.basename(stem)
            for short in dict.fromkeys([file, stem, file_stem]):
                if short != name and self.by_file.setdefault(short, position) != position:
                    self.ambiguous.add(short)
        self.real_folder = lru_cache(maxsize=None)(os.path.realpath)

    def knows(self, name: str) -> bool:
        """Whether a text names an image, be it ambiguous."""
        path = os.path.normpath(self._below_the_root(name))
        return any(
            text in names for text in (path, path.removeprefix(self.prefix)) for names in (self.by_path, self.by_file)
        )

    def _below_the_root(self, name: str) -> str:
        return name.removeprefix(self.source_root + os.sep).removeprefix(self.real_source_root + os.sep)

    def __call__(self, name: str) -> int:
        path = self._below_the_root(name)
        if os.path.isabs(path) or ".." in re.split(r"[/\\]", path):
            raise UserError(f"{name!r} is outside the root: wanted a path below {self.source_root}")
        path = os.path.normpath(path)
        shorter = path.removeprefix(self.prefix)
        position = self.by_path.get(path, self.by_path.get(shorter))
        if position is None:
            if {path, shorter} & self.ambiguous:
                raise UserError(f"{name!r} is the name of several images; wanted a path below {self.source_root}")
            position = self.by_file.get(path, self.by_file.get(shorter))
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
