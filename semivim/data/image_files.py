"""Image files below a folder: which files are images, their order, and what is left out."""

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable
from functools import cache
from typing import NamedTuple

from PIL import Image
from timm.utils.misc import natural_key

_logger = logging.getLogger(__name__)

# Formats that Pillow recognises, but cannot decode without another program or at all.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_MACOS_FOLDER = "__MACOSX"  # in archives made by macOS: one hidden file for each real one


class ImageFiles(NamedTuple):
    """Image files below a folder."""

    names: list[str]  # paths relative to the folder, in :func:`file_order`
    repeated: list[str]  # folders that links lead to again; their images count once


@cache
def image_extensions() -> frozenset[str]:
    """Lower-case extensions, with their dot, of the formats that Pillow decodes."""
    formats = Image.registered_extensions()  # loads Pillow's plugins, which fill Image.OPEN
    return frozenset(ext for ext, name in formats.items() if name in Image.OPEN and name not in _NOT_DECODED)


def file_order(name: str) -> tuple[list[int | str], str]:
    """Sort key of timm, with ties (a1 and a01, A and a) broken alike on every file system."""
    return natural_key(name), name


def is_hidden(name: str) -> bool:
    """Whether a file or folder name is hidden, or of macOS's archives."""
    return name.startswith(".") or name == _MACOS_FOLDER


def find_image_files(root: str, extensions: Collection[str] | None = None) -> ImageFiles:
    """Find every image below a folder, and log in one line what is left out.

    Hidden files and folders and ``__MACOSX`` hold no images, and a folder that links lead to again counts once.

    Args:
        root: Folder to search.
        extensions: Lower-case extensions of images, with their dot; those that Pillow decodes if None.
    """
    wanted = image_extensions() if extensions is None else extensions
    names: list[str] = []
    left_out: list[str] = []
    repeated: list[str] = []
    seen: set[str] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # by a link, which may also lead round in a circle
            repeated.append(folder)
            subfolders.clear()
            continue
        seen.add(real)
        left_out += [os.path.relpath(os.path.join(folder, name), root) for name in subfolders if is_hidden(name)]
        subfolders[:] = sorted(name for name in subfolders if not is_hidden(name))
        for file in files:
            is_image = not is_hidden(file) and os.path.splitext(file)[1].lower() in wanted
            (names if is_image else left_out).append(os.path.relpath(os.path.join(folder, file), root))
    log_left_out(root, left_out)
    return ImageFiles(sorted(names, key=file_order), repeated)


def log_left_out(root: str, names: list[str]) -> None:
    """Log in one line what is left out of a folder or archive, if anything."""
    if names:
        _logger.warning("%s: left out %s", root, _counted(names))


def classes_of_files(names: Iterable[str]) -> list[str]:
    """Class of each image file, the outermost folder of its relative path; '' for a file in no folder."""
    return [name.split(os.sep, 1)[0] if os.sep in name else "" for name in names]


def _counted(left_out: list[str]) -> str:
    """Count names by extension, with an example of each of the most frequent ones."""
    examples: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for name in sorted(left_out, key=file_order):
        is_kept_out = any(is_hidden(part) for part in name.split(os.sep))
        kind = "hidden" if is_kept_out else os.path.splitext(name)[1].lower() or "without extension"
        counts[kind] += 1
        examples.setdefault(kind, name)
    kinds = [f"{n:,} {kind} (such as {examples[kind]!r})" for kind, n in counts.most_common(5)]
    return ", ".join(kinds) + (f" and {len(counts) - 5} more kinds" if len(counts) > 5 else "")
