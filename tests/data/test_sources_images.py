"""Images as they come: pixel formats, transparency, deep pixels, damaged files."""

import gzip
import io
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from semivim.data.source_parts import join_sources
from semivim.data.sources import (
    ImageSource,
    UnreadableImageError,
    _range_said,
    open_source,
    open_unlabelled_folder,
)
from semivim.utils.pixels import PixelRules


def grey(source, index):
    return np.asarray(source.image(index).convert("L"))[0, 0]


def test_every_pixel_format_becomes_8_bits_of_grey_or_colour():
    def shown(image):
        image = ImageSource(lambda _: image, [0]).image(0)
        return image.mode, np.asarray(image).tolist()

    deep = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    assert shown(Image.fromarray(deep)) == ("L", [[0, 0, 1, 128, 255]])
    assert shown(Image.fromarray(deep.astype(">u2"))) == ("L", [[0, 0, 1, 128, 255]])
    assert shown(Image.new("1", (1, 1), 1)) == ("L", [[255]])
    assert shown(Image.new("LA", (1, 1), (7, 0))) == ("L", [[255]])
    assert shown(Image.new("RGBA", (1, 1), (1, 2, 3, 0))) == ("RGB", [[[255, 255, 255]]])
    assert shown(Image.new("CMYK", (1, 1), (255, 0, 0, 0))) == ("RGB", [[[0, 255, 255]]])
    for mode in ("F", "I", "La"):
        with pytest.raises(UnreadableImageError, match=f"image 0 is unreadable: .*{mode}"):
            shown(Image.new(mode, (2, 2)))


def test_palette_with_transparency_and_moving_pictures():
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 8, 7, 1, 2, 3])
    palette.putpixel((1, 0), 1)
    files = [io.BytesIO() for _ in range(2)]
    palette.save(files[0], "PNG", transparency=bytes([0, 128]))
    palette.save(files[1], "GIF", save_all=True, append_images=[Image.new("P", (2, 1), 1)])
    for file, expected in zip(files, ([[255, 255, 255], [128, 128, 129]], [[9, 8, 7], [1, 2, 3]]), strict=True):
        image = ImageSource(lambda _, file=file: Image.open(file), [0]).image(0)
        assert np.asarray(image).tolist() == [expected]


def test_rules_for_pixels_hold_in_joined_sources(write_images):
    root = write_images(["train/cat/1.png", "train/dog/2.png", "heap/3.png"])
    for name in ("train/cat/1.png", "heap/3.png"):
        Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(root / name)
    source = open_source("", str(root), rules=PixelRules((1, 2, 3)))
    joined = join_sources(source, open_unlabelled_folder(str(root / "heap")))
    for part, index in ((source, 0), (joined, 0), (joined, 2)):
        assert np.asarray(part.image(index))[0, 0].tolist() == [1, 2, 3]
    assert np.asarray(open_source("", str(root)).image(0))[0, 0].tolist() == [255, 255, 255]


def _read_all(source):
    return [source.image(index) for index in range(len(source))]


def test_little_used_range_is_said_once_for_all_processes(write_images, caplog):
    _range_said.cache_clear()
    root = write_images(["train/cat/1.png", "train/dog/2.png"])
    for name in ("cat/1.png", "dog/2.png"):
        Image.fromarray(np.full((2, 2), 4095, dtype=np.uint16)).save(root / "train" / name)
    source = open_source("", str(root))
    worker = torch.multiprocessing.get_context("spawn").Process(target=_read_all, args=(source,))
    _read_all(source)
    _read_all(open_source("", str(root), rules=PixelRules(max_value=4095)))
    assert [record.getMessage() for record in caplog.records] == [
        f"{root}/train/cat/1.png uses under 1/8 of its range: its largest value is 4095; state the value that is white "
        "(--max-value)"
    ]
    _range_said().fill_(False)
    worker.start()
    worker.join()
    assert worker.exitcode == 0
    assert _range_said()  # the worker's warning counts here too


def _truncated(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _bomb(path):
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    content = path.read_bytes()
    chunk = b"IHDR" + header
    path.write_bytes(content[:8] + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:])


@pytest.mark.parametrize(
    "damage",
    [
        _truncated,
        _bomb,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no picture"),
        lambda path: path.write_bytes(gzip.compress(path.read_bytes())),
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:40] + b"\xff" * 20 + path.read_bytes()[60:]),
    ],
)
def test_unreadable_images_are_named(write_images, damage):
    root = write_images(["a/good.png", "b/bad.png"])
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(root / "b/bad.png")
    source = open_source("", str(root), ".")
    damage(root / "b/bad.png")
    with pytest.raises(UnreadableImageError, match=r"b/bad.png is unreadable: \S"):
        source.image(1)
    assert grey(source, 0) == 0


def test_a_huge_jpeg_is_shrunk_while_it_is_decoded_and_its_warning_names_it(tmp_path, caplog, monkeypatch):
    Image.new("RGB", (1600, 1200), (9, 99, 199)).save(tmp_path / "huge.jpg")
    Image.new("RGB", (150, 120), (9, 99, 199)).save(tmp_path / "small.jpg")
    source = open_unlabelled_folder(str(tmp_path))
    assert [source.image(i).size for i in range(2)] == [(1600, 1200), (150, 120)]
    source.least_side = 100
    assert [source.image(i).size for i in range(2)] == [(200, 150), (150, 120)]
    assert max(abs(a - b) for a, b in zip(source.image(0).getpixel((3, 3)), (9, 99, 199), strict=True)) <= 2
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    caplog.clear()
    for _ in range(2):
        source.image(0)
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path}/huge.jpg: Image size (1920000 pixels) exceeds limit")


def test_huge_jpegs_in_tar_files_and_shards_are_shrunk_too(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (800, 600), (9, 99, 199)).save(picture, "JPEG")
    for name, members in {"data.tar": ["cat/a.jpg"], "shard-train-0.tar": ["a.jpg"]}.items():
        with tarfile.open(tmp_path / name, "w") as archive:
            for member in map(tarfile.TarInfo, members):
                member.size = picture.tell()
                archive.addfile(member, io.BytesIO(picture.getvalue()))
    for source in (open_source("", str(tmp_path / "data.tar")), open_source("wds/shard", str(tmp_path), "train")):
        assert source.image(0).size == (800, 600)
        source.least_side = 100
        assert source.image(0).size == (200, 150)


def test_a_line_of_pixels_is_refused_before_it_is_enlarged(tmp_path):
    """224 rows of a picture of 1 x 60,000 would be 9 gigabytes."""
    for size, fits in (((50, 1), True), ((1, 50), True), ((51, 1), False), ((2, 60_000), False)):
        Image.new("L", size).save(tmp_path / "line.png")
        source = open_unlabelled_folder(str(tmp_path))
        if fits:
            assert source.image(0).size == size
            continue
        with pytest.raises(UnreadableImageError, match=r"line\.png is unreadable: its sides are \d+ and "):
            source.image(0)
