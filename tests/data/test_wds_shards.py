import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from semivim.data import UnreadableImageError, check_sources, make_split, open_source
from semivim.data.wds_shards import index_shards


def write_shard(path, samples):
    """Write (key, extension, bytes) members."""
    with tarfile.open(path, "w") as archive:
        for key, extension, content in samples:
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def png(value):
    buffer = io.BytesIO()
    Image.new("L", (6, 5), value).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path):
    for shard in range(2):
        samples = []
        for i in range(4):
            value = 10 * shard + i
            samples += [(f"s{value}", "cls", str(value % 2).encode()), (f"s{value}", "png", png(value))]
        write_shard(tmp_path / f"toy-train-{shard}.tar", [*samples, (f"free{shard}", "png", png(99))])
    write_shard(tmp_path / "toy-validation-0.tar", [("v", "png", png(7)), ("v", "cls", b"1\n")])
    return tmp_path


def test_images_labels_and_names_by_index(root):
    source = open_source("wds/toy", str(root), "train")
    assert source.labels.tolist() == [0, 1, 0, 1, -1, 0, 1, 0, 1, -1]
    values = [np.asarray(source.image(i))[0, 0] for i in (9, 0, 6)]  # out of order, across shards
    assert values == [99, 0, 11]
    assert source.describe(6).endswith("toy-train-1.tar/s11")
    assert open_source("wds/toy", str(root), "validation").labels.tolist() == [1]
    check_sources(source, open_source("wds/toy", str(root), "validation"), "validation")  # one folder, other shards
    split = make_split(source.labels, 2, per_class=1)
    assert len(split.unlabelled) == 8


def test_keys_can_be_named(root):
    write_shard(root / "other.tar", [("a", "bmp", b"x"), ("a", "label", b"3")])
    assert index_shards(str(root), "other", "bmp", "label").labels == [3]


def test_faults_are_named(root):
    with pytest.raises(ValueError, match=r"no shard \*nonesuch\*\.tar"):
        index_shards(str(root), "nonesuch")
    (root / "broken.tar").write_bytes(b"not a tar" * 200)
    with pytest.raises(ValueError, match=r"broken\.tar is not a plain tar file"):
        index_shards(str(root), "broken")
    write_shard(root / "word.tar", [("a", "png", png(1)), ("a", "cls", b"cat")])
    with pytest.raises(ValueError, match=r"word\.tar: target a\.cls is 'cat', wanted a whole number"):
        index_shards(str(root), "word")
    write_shard(root / "bare.tar", [("a", "cls", b"1")])
    with pytest.raises(ValueError, match="hold no jpg, jpeg, png, webp image"):
        index_shards(str(root), "bare")
    write_shard(root / "cut.tar", [("a", "png", png(1)[:20])])
    with pytest.raises(UnreadableImageError, match="cut"):
        open_source("wds/toy", str(root), "cut").image(0)
