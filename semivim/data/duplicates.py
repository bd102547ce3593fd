"""Validation images that are training images too, byte for byte under other names."""

import hashlib
import os
import random
from collections import defaultdict
from collections.abc import Callable

from semivim.data.sources import ImageSource
from semivim.data.wds_shards import ShardReader

MAX_LOOKED_AT = 2000  # validation images; of more a fixed sample is looked at, so that a start takes seconds
_END_BYTES = 4096


def describe_duplicates(source: ImageSource, val_source: ImageSource) -> str:
    """Say in a line how many validation images are among the training images, '' for none or images without files.

    Files of equal size are compared by their last bytes, and only what agrees there by its SHA-256.

    Args:
        source: Images to train on.
        val_source: Validation images.
    """
    looked_at = list(range(len(val_source)))
    if len(looked_at) > MAX_LOOKED_AT:
        looked_at = sorted(random.Random(0).sample(looked_at, MAX_LOOKED_AT))
    theirs = {("validation", i): place for i in looked_at if (place := _place(val_source, i))}
    sizes = {size for _, _, size in theirs.values()} - {0}
    ours = {("training", i): place for i in range(len(source)) if (place := _place(source, i)) and place[2] in sizes}
    for key in (_end, _sha256):
        theirs, ours = _with_equal(theirs, ours, key)
    if not theirs:
        return ""
    (_, theirs_first), (_, ours_first) = next(iter(theirs)), next(iter(ours))
    return (
        f"warning: {len(theirs):,} of {len(looked_at):,} validation images looked at are training images under other "
        f"names, such as {val_source.describe(theirs_first)} and {source.describe(ours_first)}: accuracy is too high"
    )


_Place = tuple[str, int, int]  # file, offset and size in bytes
_Places = dict[tuple[str, int], _Place]


def _place(source: ImageSource, index: int) -> _Place | None:
    """Where the bytes of an image lie, None for one without a file that can be read."""
    if isinstance(source.read, ShardReader):
        return source.read.places[index]
    path = source.describe(index)
    try:
        return None if source.names is None else (path, 0, os.path.getsize(path))
    except OSError:
        return None


def _with_equal(first: _Places, second: _Places, key: Callable[[_Place], bytes]) -> tuple[_Places, _Places]:
    """What has the same key in both, that of ``second`` in the order of ``first``."""
    found: dict[bytes, list[tuple[str, int]]] = defaultdict(list)
    for name, place in second.items():
        found[key(place)].append(name)
    keys = {name: key(place) for name, place in first.items()} if second else {}
    left = {name: first[name] for name, value in keys.items() if value in found}
    right = {other: second[other] for name in left for other in found[keys[name]]}
    return left, right


def _end(place: _Place) -> bytes:
    path, offset, size = place
    return size.to_bytes(8, "little") + _read(path, offset + max(0, size - _END_BYTES), min(size, _END_BYTES))


def _sha256(place: _Place) -> bytes:
    return hashlib.sha256(_read(*place)).digest()


def _read(path: str, offset: int, size: int) -> bytes:
    """Bytes of a file; those of its name, which equal no other's, where it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError:
        return path.encode(errors="surrogateescape")
