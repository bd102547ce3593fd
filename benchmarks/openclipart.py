"""Prepare Debian's openclipart-png as a long-tailed data set of small pictures, in class folders.

    apt-get download openclipart-png && dpkg -x openclipart-png_*.deb X
    python benchmarks/openclipart.py X/usr/share/openclipart/png OUT

Folders of the package are the classes, but for `special` and `unsorted`, which name no subject. Every picture is put on
white, fitted into 64 x 64 pixels, and dropped with a count where it cannot be read, is huge, or looks like one before
it: the themes of the collection repeat each other. A picture that two classes share is dropped from both, and so are
the classes of fewer than 10 pictures. A third of each class is for validation, drawn by the hash of its pixels.
"""

import argparse
import hashlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from semivim.utils.pixels import PixelRules, to_8_bit

NO_CLASSES = ("special", "unsorted")
MAX_PIXELS = 40_000_000
MIN_PICTURES = 10  # of a class: the recall of two validation pictures says nothing
SIDE = 64


def small_picture(path: Path) -> Image.Image | None:
    """A picture on a white square of 64 pixels; None for a huge one.

    Raises:
        OSError: If the file is no picture, or truncated.
    """
    Image.MAX_IMAGE_PIXELS = None  # the size is looked at before anything is decoded
    with Image.open(path) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            return None
        opened.load()
        picture = to_8_bit(opened, PixelRules()).convert("RGB")
    picture.thumbnail((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=None)
    square = Image.new("RGB", (SIDE, SIDE), "white")
    square.paste(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
    return square


def look(picture: Image.Image) -> bytes:
    """What two pictures share that look alike: 16 x 16 pixels of 16 levels."""
    coarse = np.asarray(picture.resize((16, 16), Image.Resampling.BOX)) >> 4
    return hashlib.sha256(coarse.tobytes()).digest()


def collect(source: Path, dropped: Counter[str]) -> dict[str, dict[bytes, Image.Image]]:
    """Pictures of each class by their look; counts what is dropped."""
    found: dict[bytes, dict[str, Image.Image]] = defaultdict(dict)
    for path in sorted(source.rglob("*.png")):
        name = path.relative_to(source).parts[0]
        if name in NO_CLASSES:
            continue
        try:
            picture = small_picture(path)
        except (OSError, UnidentifiedImageError, ValueError, SyntaxError):
            dropped["cannot be read"] += 1
            continue
        if picture is None:
            dropped[f"over {MAX_PIXELS:,} pixels"] += 1
            continue
        key = look(picture)
        dropped["look like another of their class"] += name in found[key]
        found[key].setdefault(name, picture)
    classes: dict[str, dict[bytes, Image.Image]] = defaultdict(dict)
    for key, pictures in found.items():
        if len(pictures) > 1:
            dropped["shared by classes"] += len(pictures)
        else:
            classes[next(iter(pictures))][key] = next(iter(pictures.values()))
    return classes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder `png` of the package")
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    dropped: Counter[str] = Counter()
    classes = collect(args.source, dropped)
    for name, pictures in sorted(classes.items(), key=lambda item: -len(item[1])):
        if len(pictures) < MIN_PICTURES:
            dropped[f"in a class of fewer than {MIN_PICTURES} ({name})"] += len(pictures)
            continue
        num_validation = len(pictures) // 3
        for i, key in enumerate(sorted(pictures)):
            target = args.output / ("validation" if i < num_validation else "train") / name / f"{key.hex()[:16]}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            pictures[key].save(target)
        print(f"{name:20} {len(pictures) - num_validation:5} for training, {num_validation:4} for validation")
    for reason, number in dropped.items():
        print(f"dropped: {number:5} {reason}")


if __name__ == "__main__":
    main()
