"""WebDataset shards by index: images are read in place from plain tar files, so that they can be split and shuffled."""

import io
import posixpath
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from semivim.data.image_files import log_left_out
from semivim.data.label_split import UNKNOWN
from semivim.utils.user_error import UserError

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
TARGET_KEY = "cls"


class Shards(NamedTuple):
    """Images of a set of shards, in the order of files and members."""

    read: "ShardReader"
    labels: list[int]  # -1 where a sample has no target
    names: list[str]  # shard/key


class ShardReader:
    """Opens the image at an index from its bytes in a tar file.

    Args:
        places: File, offset and size in bytes of each image.
    """

    def __init__(self, places: Sequence[tuple[str, int, int]]) -> None:
        self.places = places

    def __call__(self, index: int) -> Image.Image:
        path, offset, size = self.places[index]
        with open(path, "rb") as file:
            file.seek(offset)
            return Image.open(io.BytesIO(file.read(size)))  # decoded where the size is known


def index_shards(root: str, split: str, input_key: str | None = None, target_key: str | None = None) -> Shards:
    """Index the uncompressed shards ``*<split>*.tar`` of a folder; only headers and targets are read.

    The members of a shard that share a key are one sample. The first dot of a file name separates the key from the
    extension, whose case does not matter.

    Args:
        root: Folder of the shards.
        split: Part of the shards' file names.
        input_key: Extensions that hold an image, separated by ``;``; the first that a sample has is read. jpg, jpeg,
            png and webp if None.
        target_key: Extension that holds the class as a whole number; cls if None.

    Raises:
        UserError: If there is no shard, one is not a plain tar file, a target is no whole number, or a sample is
            repeated or has a target and no image; it is named.
    """
    shards = sorted(path for path in Path(root).glob("*.tar") if split in path.stem)
    if not shards:
        found = ", ".join(sorted(path.name for path in Path(root).glob("*.tar"))[:5]) or "no .tar"
        raise UserError(f"split {split!r}: no shard *{split}*.tar in {root}, which holds {found}")
    image_keys = tuple(input_key.lower().split(";")) if input_key else IMAGE_KEYS
    target_key = target_key.lower() if target_key else TARGET_KEY
    places: list[tuple[str, int, int]] = []
    labels: list[int] = []
    names: list[str] = []
    left_out: list[str] = []
    for shard in shards:
        try:
            with tarfile.open(shard, "r:") as archive:
                for key, sample in _samples(archive, shard, {*image_keys, target_key}, left_out).items():
                    image = next((sample[extension] for extension in image_keys if extension in sample), None)
                    if image is None:
                        name = sample[target_key].name
                        raise UserError(f"{shard}: {name} has no {', '.join(image_keys)} image beside it")
                    places.append((str(shard), image.offset_data, image.size))
                    labels.append(_target(archive, sample[target_key], shard) if target_key in sample else UNKNOWN)
                    names.append(f"{shard.name}/{key}")
        except tarfile.TarError as error:
            raise UserError(f"{shard} is not a plain tar file: {error}") from error
    log_left_out(root, left_out)
    if not places:
        raise UserError(f"the {len(shards)} shards *{split}*.tar in {root} hold no {', '.join(image_keys)} image")
    return Shards(ShardReader(places), labels, names)


def _samples(
    archive: tarfile.TarFile, shard: Path, wanted: set[str], left_out: list[str]
) -> dict[str, dict[str, tarfile.TarInfo]]:
    """Members with a wanted extension, by key and extension; files with others are added to ``left_out``."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in archive:
        key, extension = _key_and_extension(member.name)
        if member.isdir():
            continue
        if extension not in wanted:
            left_out.append(f"{shard.name}/{member.name.removeprefix('./')}")
            continue
        if not member.isreg():
            raise UserError(f"{shard}: {member.name} is a link, wanted a file")
        if samples.setdefault(key, {}).setdefault(extension, member) is not member:
            raise UserError(f"{shard}: {member.name} is there twice")
    return samples


def _key_and_extension(name: str) -> tuple[str, str]:
    """Split a member's name as the webdataset package does; a hidden file gets no extension, and so is skipped."""
    folder, file = posixpath.split(posixpath.normpath(name))
    base, _, extension = file.partition(".")
    return posixpath.join(folder, base), extension.lower() if base else ""


def _target(archive: tarfile.TarFile, member: tarfile.TarInfo, shard: Path) -> int:
    file = archive.extractfile(member)
    text = file.read().decode("utf-8", "replace").strip() if file else ""
    if not text.isdecimal():
        raise UserError(f"{shard}: target {member.name} is {text[:40]!r}, wanted a whole number")
    return int(text)
