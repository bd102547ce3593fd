import os
import shutil

import numpy as np
from PIL import Image

from semivim.data import duplicates
from semivim.data.duplicates import describe_duplicates
from semivim.data.source_parts import join_sources
from semivim.data.sources import ImageSource, open_source, open_unlabelled_folder
from tests.data.test_wds_shards import png, write_shard


def write(folder, values):
    for name, value in values.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (9, 9), value).save(path)


def opened(root):
    return open_source("", str(root), "train"), open_source("", str(root), "validation")


def test_equal_content_under_other_names_is_told(tmp_path):
    write(tmp_path, {"train/a/1.png": 1, "train/b/2.png": 2, "validation/a/x.png": 3, "validation/b/y.png": 4})
    assert describe_duplicates(*opened(tmp_path)) == ""  # of equal size, all of them
    shutil.copy(tmp_path / "train/b/2.png", tmp_path / "validation/a/z.png")
    said = describe_duplicates(*opened(tmp_path))
    assert said.startswith(
        "warning: 1 of 3 validation images looked at are training images under other names, such as "
    )
    assert f"{tmp_path}/validation/a/z.png and {tmp_path}/train/b/2.png: " in said
    # of a heap of unlabelled images too
    write(tmp_path, {"heap/q.png": 4})
    source, val_source = opened(tmp_path)
    source = join_sources(source, open_unlabelled_folder(str(tmp_path / "heap")))
    assert describe_duplicates(source, val_source).startswith("warning: 2 of 3 validation images")


def test_images_in_shards_are_compared(tmp_path):
    for split, values in (("train", (1, 2)), ("validation", (2, 3))):
        samples = [(f"{split}{v}", ext, content) for v in values for ext, content in (("png", png(v)), ("cls", b"0"))]
        write_shard(tmp_path / f"{split}.tar", samples)
    sources = (open_source("wds/x", str(tmp_path), split) for split in ("train", "validation"))
    assert "warning: 1 of 2 validation images" in describe_duplicates(*sources)


def test_images_without_files_and_files_that_vanish_are_passed_over(tmp_path):
    digits = ImageSource(lambda index: Image.new("L", (8, 8), index), np.zeros(4, dtype=int))
    assert describe_duplicates(digits, digits) == ""
    write(tmp_path, {"train/a/1.png": 1, "validation/a/1.png": 1})
    source, val_source = opened(tmp_path)
    assert "warning" in describe_duplicates(source, val_source)
    os.remove(tmp_path / "train/a/1.png")
    assert describe_duplicates(source, val_source) == ""


def test_only_what_may_be_equal_is_read(tmp_path, monkeypatch):
    write(tmp_path, {f"validation/a/{n}.png": n for n in range(5)} | {"train/a/0.png": 0, "train/a/9.png": 9})
    (tmp_path / "train/a/9.png").write_bytes(b"another size")
    read, whole = duplicates._read, []
    monkeypatch.setattr(duplicates, "_read", lambda *place: whole.append(place) or read(*place))
    assert "warning: 1 of 5" in describe_duplicates(*opened(tmp_path))
    assert not [path for path, *_ in whole if path.endswith("9.png")]
    monkeypatch.setattr(duplicates, "MAX_LOOKED_AT", 2)
    assert "5" not in describe_duplicates(*opened(tmp_path)).split("validation images")[0]
