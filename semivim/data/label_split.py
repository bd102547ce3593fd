"""Splits of a training set into labelled, unlabelled and validation images: drawn or given, checked, kept as text.

Classes are counted by the labels of the whole set; -1 marks an image without a known label, which can only be used as
an unlabelled one.
"""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from semivim.utils.files import write_text
from semivim.utils.user_error import UserError, one_line

_logger = logging.getLogger(__name__)

UNKNOWN = -1  # label of an image whose class is not known


@dataclass(frozen=True)
class LabelSplit:
    """Labelled and unlabelled images of one training set.

    Args:
        labels: Class of every image of the set, ``(n,)``, int64; -1 where unknown.
        labelled: Positions of the images whose labels may be used, ascending, int64.
        unlabelled: Positions of the images used without their labels, ascending, int64.
        num_classes: Number of classes.
        class_names: Names of the classes for messages; None where there are none.
        validation: Positions of the images held out for evaluation, ascending, int64; none by default.
    """

    labels: np.ndarray
    labelled: np.ndarray
    unlabelled: np.ndarray
    num_classes: int
    class_names: Sequence[str] | None = None
    validation: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    @property
    def sha256(self) -> str:
        """SHA-256 of the labelled positions, their labels, the unlabelled positions and those held out, if any."""
        digest = hashlib.sha256(f"{len(self.labels)} {self.num_classes}\n".encode())
        held_out = [self.validation, self.labels[self.validation]] if len(self.validation) else []
        for part in (self.labelled, self.labels[self.labelled], self.unlabelled, *held_out):
            digest.update(np.ascontiguousarray(part, dtype="<i8").tobytes() + b"\n")
        return digest.hexdigest()

    @property
    def labels_per_class(self) -> np.ndarray:
        """Labelled images of each class, ``(num_classes,)``."""
        return np.bincount(self.labels[self.labelled], minlength=self.num_classes)

    @property
    def classes_without_label(self) -> np.ndarray:
        """Classes of which no image is labelled."""
        return np.flatnonzero(self.labels_per_class == 0)

    @property
    def effective_fraction(self) -> float:
        """Share of labelled images among all images used."""
        return len(self.labelled) / len(np.union1d(self.labelled, self.unlabelled))

    @property
    def ceiling(self) -> float:
        """Upper bound of balanced accuracy: a class without a labelled image is never predicted."""
        return 1 - len(self.classes_without_label) / self.num_classes

    def report(self) -> str:
        """Describe the split in a few lines."""
        per_class, missing = self.labels_per_class, self.classes_without_label
        lines = [
            f"labels: {len(self.labelled):,} of {len(self.labels):,} images ({self.effective_fraction:.2%} of those "
            f"used), {len(self.unlabelled):,} unlabelled, {self.num_classes} classes",
            f"labels per class: smallest {per_class.min()}, median {np.median(per_class):g}, largest {per_class.max()}",
        ]
        if len(self.validation):
            lines.insert(1, f"validation: {len(self.validation):,} images held out")
        if len(missing):
            lines.append(
                f"classes without labels: {len(missing)} ({_listed(missing, self.class_names)}); "
                f"balanced accuracy cannot exceed {self.ceiling:.1%}"
            )
        return "\n".join([*lines, f"sha256: {self.sha256}"])


# PLR0913: an argument for each flag of a split
def make_split(  # noqa: PLR0913
    labels: Sequence[int] | np.ndarray,
    num_classes: int,
    *,
    fraction: float | None = None,
    per_class: int | None = None,
    imb_n1: int | None = None,
    imb_m1: int | None = None,
    imb_factor_l: float = 1.0,
    imb_factor_u: float = 1.0,
    min_per_class: int = 1,
    seed: int = 42,
    fold: int = 0,
    include_labelled: bool = False,
    validation: Sequence[int] | np.ndarray = (),
    class_names: Sequence[str] | None = None,
) -> LabelSplit:
    """Draw the labelled images; the others become unlabelled.

    Exactly one of ``fraction``, ``per_class`` and ``imb_n1`` sets their number. For one (seed, fold) a smaller draw is
    a subset of a larger one.

    Args:
        labels: Class of every image, ``(n,)``; -1 where unknown.
        num_classes: Number of classes.
        fraction: Share of every class to label, in (0, 1].
        per_class: Images of every class to label; all of a class that has fewer, which a line in the log names.
        imb_n1: Images of the first class to label; the others follow ``imb_factor_l``.
        imb_m1: Unlabelled images of the first class, beside ``imb_n1``; the others follow ``imb_factor_u``. All that is
            left if None.
        imb_factor_l: Labelled images of the first class over those of the last, at least 1.
        imb_factor_u: The same for unlabelled images; negative reverses the order of the classes.
        min_per_class: Labels that every class gets at least with ``fraction``; 0 accepts classes without any.
        seed: Seed of the draw.
        fold: Number of the draw for that seed.
        include_labelled: Use the labelled images as unlabelled ones too.
        validation: Positions of the images held out for evaluation, which are neither (see :func:`draw_validation`).
        class_names: Names of the classes for messages.

    Raises:
        UserError: If an argument is out of range, images are lacking, or the split fails ``complete_split``.
    """
    labels = np.asarray(labels, dtype=np.int64)
    check_labels(labels, num_classes)
    given = {"fraction": fraction, "per_class": per_class, "imb_n1": imb_n1}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        flags, taken = (", ".join(_FLAGS[name] for name in names) for names in (given, chosen))
        raise UserError(f"give exactly one of {flags}, got {taken or 'none'}")
    _refuse_unread(
        "--imb-n1", imb_n1, imb_m1=(imb_m1, None), imb_factor_l=(imb_factor_l, 1), imb_factor_u=(imb_factor_u, 1)
    )
    _refuse_unread("--imb-m1", imb_m1, imb_factor_u=(imb_factor_u, 1))
    if min_per_class < 0:
        raise UserError(f"--min-per-class must not be negative, got {min_per_class}")
    if fraction is None and min_per_class > 1:
        raise UserError(
            f"--min-per-class is {min_per_class}, which only --label-fraction reads; with {_FLAGS[chosen[0]]} it is 0 "
            "or 1"
        )
    members = _shuffled_members(labels, num_classes, seed, fold)
    members = [m[~np.isin(m, validation)] for m in members]
    sizes = np.array([len(m) for m in members])
    unlabelled = None
    if imb_n1 is not None:
        counts = long_tail(num_classes, imb_n1, imb_factor_l, "--imb-n1", "--imb-factor-l")
        if imb_m1 is not None:
            rest = [m[n:] for m, n in zip(members, counts, strict=True)]
            unlabelled_counts = long_tail(num_classes, imb_m1, imb_factor_u, "--imb-m1", "--imb-factor-u")
            unlabelled = _take(rest, unlabelled_counts, "--imb-m1", class_names)
    elif fraction is not None:
        counts = _fraction_counts(sizes, fraction, min_per_class)
    else:
        counts = _up_to(sizes, per_class or 0, class_names)
    labelled = _take(members, counts, _FLAGS[chosen[0]], class_names)
    return complete_split(
        labels, num_classes, labelled, unlabelled, min_per_class, include_labelled, validation, class_names
    )


def draw_validation(
    labels: np.ndarray, num_classes: int, fraction: float, *, seed: int = 42, fold: int = 0
) -> np.ndarray:
    """Draw a share of every class to hold out for evaluation: at least one image of a class, never all of it.

    The draw is the end of the order that ``make_split`` labels from the start of.

    Args:
        labels: Class of every image, ``(n,)``; those of an unknown class, -1, are not held out.
        num_classes: Number of classes.
        fraction: Share of every class, in (0, 1).
        seed: Seed of the draw.
        fold: Number of the draw for that seed.

    Returns:
        Positions, int64.

    Raises:
        UserError: If the share is out of range, or no class has two images.
    """
    check_labels(labels, num_classes)
    if not 0 < fraction < 1:
        raise UserError(f"--val-fraction must be in (0, 1), got {fraction}")
    drawn = []
    for members in _shuffled_members(labels, num_classes, seed, fold):
        size = len(members)
        count = max(min(max(int(fraction * size + 0.5), 1), size - 1), 0)
        drawn.append(members[size - count :])
    if not sum(map(len, drawn)):
        raise UserError(f"--val-fraction {fraction}: no class has two images, one to hold out and one to train on")
    return np.concatenate(drawn)


def complete_split(
    labels: np.ndarray,
    num_classes: int,
    labelled: Sequence[int] | np.ndarray,
    unlabelled: Sequence[int] | np.ndarray | None = None,
    min_per_class: int = 1,
    include_labelled: bool = False,
    validation: Sequence[int] | np.ndarray = (),
    class_names: Sequence[str] | None = None,
    describe: Callable[[int], str] = "image {}".format,
) -> LabelSplit:
    """Make a checked split of given positions.

    Args:
        labels: Class of every image, ``(n,)``; -1 where unknown.
        num_classes: Number of classes.
        labelled: Positions of the labelled images.
        unlabelled: Positions of the unlabelled ones; all that are not labelled if None.
        min_per_class: 0 accepts classes without a labelled image.
        include_labelled: Use the labelled images as unlabelled ones too.
        validation: Positions of the images held out for evaluation, which all have a label.
        class_names: Names of the classes for messages.
        describe: Names the image at a position, for messages.

    Raises:
        UserError: If a position is out of range, repeated, or without a label; if a class, or all, have no labelled
            image; if labelled and unlabelled images overlap, or those held out overlap with others.
    """
    check_labels(labels, num_classes, describe)
    validation = _check_positions("validation", validation, len(labels))
    labelled = _check_positions("labelled", labelled, len(labels))
    if len(labelled) == 0:
        raise UserError(f"none of the {len(labels)} images is labelled: label more, or give --min-per-class 1")
    if (labels[labelled] == UNKNOWN).any():
        first = labelled[labels[labelled] == UNKNOWN][0]
        raise UserError(f"{describe(first)} is to be labelled, but its class is not known")
    if unlabelled is None:
        unlabelled = np.setdiff1d(np.arange(len(labels)), np.concatenate([labelled, validation]))
    else:
        unlabelled = _check_positions("unlabelled", unlabelled, len(labels))
        both = np.intersect1d(labelled, unlabelled)
        if len(both) and not include_labelled:
            raise UserError(
                f"{len(both)} images are both labelled and unlabelled, the first is {describe(both[0])}; "
                f"--unlabeled-include-labeled accepts that"
            )
    if include_labelled:
        unlabelled = np.union1d(labelled, unlabelled)
    both = np.intersect1d(validation, np.union1d(labelled, unlabelled))
    if len(both):
        raise UserError(f"{len(both)} images are to train on and to validate, the first is {describe(both[0])}")
    split = LabelSplit(labels, labelled, unlabelled, num_classes, class_names, validation)
    missing = split.classes_without_label
    if len(missing) and min_per_class > 0:
        raise UserError(
            f"{len(missing)} of {num_classes} classes have no labelled image: {_listed(missing, class_names)}; "
            f"--min-per-class 0 accepts that"
        )
    return split


def check_labels(labels: np.ndarray, num_classes: int, describe: Callable[[int], str] = "image {}".format) -> None:
    """Refuse labels outside [-1, num_classes)."""
    wrong = np.flatnonzero((labels < UNKNOWN) | (labels >= num_classes))
    if len(wrong):
        label, image = labels[wrong[0]], describe(wrong[0])
        raise UserError(f"label {label} of {image} is out of range for --num-classes {num_classes}")


def long_tail(
    num_classes: int, first: int, factor: float, first_name: str = "first", factor_name: str = "factor"
) -> np.ndarray:
    """n_k = floor(n_1 * factor^(-(k-1)/(K-1))), reversed for a negative factor.

    Args:
        num_classes: K.
        first: n_1, images of the largest class.
        factor: n_1 / n_K, at least 1; its negative gives the largest count to the last class.
        first_name: What an error calls ``first``.
        factor_name: What an error calls ``factor``.

    Returns:
        Images of each class, ``(num_classes,)``, int64.
    Source: Kim et al. 2020, DARP (arXiv:2007.08844), Section 4.1.
    """
    if first < 1:
        raise UserError(f"{first_name} must be at least 1, got {first}")
    if abs(factor) < 1:
        raise UserError(f"{factor_name} must be at least 1, or at most -1 for the reversed order, got {factor}")
    exponent = np.arange(num_classes) / max(num_classes - 1, 1)
    # 1500 / 100 must give 15, not the 14 that rounding below it would floor to.
    counts = np.floor(first * abs(factor) ** -exponent + 1e-9).astype(np.int64)
    return counts if factor > 0 else counts[::-1].copy()


def _refuse_unread(required: str, required_value: int | None, **values: tuple[float | None, float | None]) -> None:
    """Refuse arguments, given as (value, default), that have no effect without a required one."""
    for name, (value, default) in values.items():
        if required_value is None and value != default:
            raise UserError(f"--{name.replace('_', '-')} is read only with {required}, got {value}")


def class_name(label: int, class_names: Sequence[str] | None) -> str:
    """A class as the user knows it."""
    return repr(class_names[label]) if class_names and label < len(class_names) else str(label)


def _listed(classes: np.ndarray, class_names: Sequence[str] | None, limit: int = 10) -> str:
    more = ", ..." if len(classes) > limit else ""
    return ", ".join(class_name(label, class_names) for label in classes[:limit]) + more


def _check_positions(name: str, positions: Sequence[int] | np.ndarray, num_images: int) -> np.ndarray:
    positions = np.asarray(positions, dtype=np.int64)
    outside = positions[(positions < 0) | (positions >= num_images)]
    if len(outside):
        raise UserError(f"{name} index {outside[0]} is out of range for {num_images} images")
    unique, counts = np.unique(positions, return_counts=True)
    if len(unique) < len(positions):
        raise UserError(f"{name} index {unique[counts > 1][0]} is given {counts.max()} times")
    return unique


def _shuffled_members(labels: np.ndarray, num_classes: int, seed: int, fold: int) -> list[np.ndarray]:
    """Positions of each class in an order that depends on (seed, fold, class) only, so that draws are nested."""
    if seed < 0 or fold < 0:
        raise UserError(f"--split-seed and --fold must not be negative, got {seed} and {fold}")
    return [
        np.random.default_rng([seed, fold, label]).permutation(np.flatnonzero(labels == label))
        for label in range(num_classes)
    ]


def _fraction_counts(sizes: np.ndarray, fraction: float, min_per_class: int) -> np.ndarray:
    if not 0 < fraction <= 1:
        raise UserError(f"--label-fraction must be in (0, 1], got {fraction}")
    proportional = np.floor(fraction * sizes + 0.5).astype(np.int64)
    return np.minimum(np.maximum(proportional, min_per_class), sizes)


def _up_to(sizes: np.ndarray, per_class: int, class_names: Sequence[str] | None) -> np.ndarray:
    """Images of each class to label, where a class may have fewer; a line names those that do."""
    short = np.flatnonzero((sizes > 0) & (sizes < per_class))  # num_classes may be more than the data set has
    if len(short):
        named = ", ".join(f"{class_name(label, class_names)} {sizes[label]}" for label in short[:10])
        more = ", ..." if len(short) > 10 else ""
        _logger.warning("--labels-per-class %d: %d classes have fewer images: %s%s", per_class, len(short), named, more)
    return np.minimum(sizes, per_class)


def _take(members: list[np.ndarray], counts: np.ndarray, name: str, class_names: Sequence[str] | None) -> np.ndarray:
    for label, (available, wanted) in enumerate(zip(members, counts, strict=True)):
        if wanted > len(available):
            of = class_name(label, class_names)
            raise UserError(f"{name} wants {wanted} images of class {of}, only {len(available)} are left")
        if wanted < 0:
            raise UserError(f"{name} must not be negative, got {wanted}")
    return np.concatenate([m[:n] for m, n in zip(members, counts, strict=True)])


_FLAGS = {"fraction": "--label-fraction", "per_class": "--labels-per-class", "imb_n1": "--imb-n1"}
_HEADER = "# semivim label split {role}: {count} of {images} images, {classes} classes, sha256 {sha256}"
_HEADER_PATTERN = re.compile(
    r"# semivim label split (\w+): (\d{1,18}) of (\d{1,18}) images, (\d{1,18}) classes, sha256 ([0-9a-f]{64})"
)


def save_split(split: LabelSplit, folder: str | os.PathLike[str], names: Sequence[str] | None = None) -> None:
    """Write labelled.txt, unlabelled.txt and, where images are held out, validation.txt.

    Each has a header, then ``index label [name]`` lines, without the label in unlabelled.txt.

    A name with a line break or undecodable bytes is written as a Python string. Each file is written atomically.

    Args:
        split: What to write.
        folder: An existing folder.
        names: Name of every image of the set, by which ``load_split`` notices a changed set; not written if None.
    """
    parts = [("labelled", split.labelled), ("unlabelled", split.unlabelled)]
    for role, positions in [*parts, *([("validation", split.validation)] if len(split.validation) else [])]:
        header = _HEADER.format(
            role=role,
            count=len(positions),
            images=len(split.labels),
            classes=split.num_classes,
            sha256=split.sha256,
        )
        columns = [positions.tolist()]
        if role != "unlabelled":
            columns.append(split.labels[positions].tolist())
        if names is not None:
            columns.append([_in_one_line(names[i]) for i in positions])
        lines = (" ".join(map(str, row)) for row in zip(*columns, strict=True))
        write_text(Path(folder) / f"{role}.txt", "\n".join([header, *lines, ""]))


def load_split(
    folder: str | os.PathLike[str],
    labels: Sequence[int] | np.ndarray,
    num_classes: int,
    names: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
) -> LabelSplit:
    """Read a saved split back and check that it belongs to this training set.

    Args:
        folder: Where ``save_split`` wrote.
        labels: Class of every image of the set now, ``(n,)``; labels of the saved list replace unknown ones.
        num_classes: Number of classes now.
        names: Name of every image of the set now; checked against the saved names where both exist.
        class_names: Names of the classes for messages.

    Raises:
        UserError: If a file is missing, damaged, or was written for another set of images; the message names it.
    """
    labels = np.array(labels, dtype=np.int64)
    parts = {}
    for role in ("labelled", "unlabelled", "validation"):
        path = Path(folder) / f"{role}.txt"
        if role == "validation" and not path.is_file():
            continue  # its absence changes the SHA-256
        header, rows = _read_saved(path, role)
        if header[:2] != (len(labels), num_classes):
            raise UserError(
                f"{path} was written for {header[0]} images of {header[1]} classes, "
                f"the data set has {len(labels)} of {num_classes}"
            )
        skip = 1 if role == "unlabelled" else 2
        positions = _check_positions(str(path), np.array([int(row[0]) for row in rows], dtype=np.int64), len(labels))
        if role != "unlabelled":
            _fill_labels(path, labels, rows, num_classes, class_names)
        if names is not None:
            _check_names(path, names, rows, skip)
        parts[role] = (positions, header[2])
    held_out = [parts["validation"][0]] if "validation" in parts else []
    split = LabelSplit(labels, parts["labelled"][0], parts["unlabelled"][0], num_classes, class_names, *held_out)
    for role, (_, sha256) in parts.items():
        if split.sha256 != sha256:  # which is that of all files together
            files = " or ".join(f"{other}.txt" for other in parts)
            raise UserError(
                f"{folder}: {files} is damaged: sha256 {split.sha256}, the header of {role}.txt says {sha256}"
            )
    return split


def _in_one_line(name: str) -> str:
    """Quote a file name that holds line breaks or bytes that are no text."""
    return name if name.isprintable() else ascii(name)


def _read_saved(path: Path, role: str) -> tuple[tuple[int, int, str], list[list[str]]]:
    if not path.is_file():
        raise UserError(f"saved split {path} does not exist")
    try:
        first, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: {one_line(error)}") from error
    match = _HEADER_PATTERN.fullmatch(first)
    if match is None or match[1] != role:
        raise UserError(f"{path} is not a saved {role} split: its first line is {first[:80]!r}")
    columns = 1 if role == "unlabelled" else 2
    rows = [line.split(" ", columns) for line in lines]
    if len(rows) != int(match[2]):
        raise UserError(f"{path} is damaged: {len(rows)} entries, its header says {match[2]}")
    for number, row in enumerate(rows, start=2):
        if len(row) < columns or not all(re.fullmatch("[0-9]{1,18}", value) for value in row[:columns]):
            raise UserError(f"{path}, line {number}: {' '.join(row)!r} does not start with {columns} numbers")
    return (int(match[3]), int(match[4]), match[5]), rows


def _fill_labels(
    path: Path, labels: np.ndarray, rows: list[list[str]], num_classes: int, class_names: Sequence[str] | None
) -> None:
    for number, row in enumerate(rows, start=2):
        index, label = int(row[0]), int(row[1])
        if label >= num_classes:
            raise UserError(f"{path}, line {number}: class {label}, the data set has {num_classes} classes")
        if labels[index] not in (UNKNOWN, label):
            said, known = (class_name(c, class_names) for c in (label, labels[index]))
            holder = "the data set" if path.name == "labelled.txt" else "labelled.txt or the data set"
            raise UserError(f"{path}, line {number}: class {said}, {holder} says {known}")
        labels[index] = label


def _check_names(path: Path, names: Sequence[str], rows: list[list[str]], column: int) -> None:
    for number, row in enumerate(rows, start=2):
        name = names[int(row[0])]
        if len(row) > column and _in_one_line(name) != row[column]:
            raise UserError(f"{path}, line {number}: image {row[0]} is {row[column]!r}, in the data set {name!r}")
