"""WebDataset shards by index: plain tar files are read in place, so a stream's images can be split and drawn."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
TARGET_KEY = "cls"


class Shards(NamedTuple):
    """Images of a set of shards, in the order of files and members."""

    read: "ShardReader"
    labels: list[int]  # -1 where a sample has no target
    names: list[str]  # shard/key


class ShardReader:
    """Decodes the image of an index from its place in a tar file.

    Args:
        places: File, offset and size in bytes of each image.
    """

    def __init__(self, places: Sequence[tuple[str, int, int]]) -> None:
        self.places = places

    def __call__(self, index: int) -> Image.Image:
        path, offset, size = self.places[index]
        with open(path, "rb") as file:
            file.seek(offset)
            image = Image.open(io.BytesIO(file.read(size)))
        image.load()
        return image


def index_shards(root: str, split: str, input_key: str | None = None, target_key: str | None = None) -> Shards:
    """Index the uncompressed shards ``*<split>*.tar`` of a folder; only headers and targets are read.

    Args:
        root: Folder of the shards.
        split: Part of the shards' file names.
        input_key: Extensions that hold an image, separated by ``;``; jpg, jpeg, png and webp if None.
        target_key: Extension that holds the class as a whole number; cls if None.

    Raises:
        ValueError: If there is no shard, one is not a plain tar file, or a target is no whole number; it is named.
    """
    shards = sorted(Path(root).glob(f"*{split}*.tar"))
    if not shards:
        raise ValueError(f"split {split!r}: no shard *{split}*.tar in {root}")
    image_keys = tuple(input_key.split(";")) if input_key else IMAGE_KEYS
    places: list[tuple[str, int, int]] = []
    labels: list[int] = []
    names: list[str] = []
    for shard in shards:
        images: dict[str, tuple[str, int, int]] = {}
        targets: dict[str, int] = {}
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    key, _, extension = member.name.partition(".")
                    if extension in image_keys:
                        images[key] = (str(shard), member.offset_data, member.size)
                    elif extension == (target_key or TARGET_KEY):
                        targets[key] = _target(archive, member, shard)
        except tarfile.TarError as error:
            raise ValueError(f"{shard} is not a plain tar file: {error}") from error
        places += images.values()
        labels += [targets.get(key, -1) for key in images]
        names += [f"{shard.name}/{key}" for key in images]
    if not places:
        raise ValueError(f"the {len(shards)} shards *{split}*.tar in {root} hold no {', '.join(image_keys)} image")
    return Shards(ShardReader(places), labels, names)


def _target(archive: tarfile.TarFile, member: tarfile.TarInfo, shard: Path) -> int:
    file = archive.extractfile(member)
    text = file.read().decode("utf-8", "replace").strip() if file else ""
    if not text.isdecimal():
        raise ValueError(f"{shard}: target {member.name} is {text[:40]!r}, wanted a whole number")
    return int(text)
