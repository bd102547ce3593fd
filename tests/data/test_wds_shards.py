import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from semivim.data import UnreadableImageError, check_sources, make_split, open_source
from semivim.data.wds_shards import index_shards
from semivim.utils.user_error import UserError


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
    assert source.describe(6) == str(root / "toy-train-1.tar/s11")
    assert open_source("wds/toy", str(root), "validation").labels.tolist() == [1]
    check_sources(source, open_source("wds/toy", str(root), "validation"), "validation")  # one folder, other shards
    split = make_split(source.labels, 2, per_class=1)
    assert len(split.unlabelled) == 8


def test_a_shard_of_training_images_is_no_validation_shard(root):
    train, val = (open_source("wds/toy", str(root), split) for split in ("train", "n-0"))
    with pytest.raises(ValueError, match=f"split 'n-0' shares {root}/toy-train-0.tar"):
        check_sources(train, val, "n-0", 2)


def test_keys_can_be_named(root):
    write_shard(root / "other.tar", [("a", "bmp", b"x"), ("a", "label", b"3")])
    assert index_shards(str(root), "other", "BMP", "Label").labels == [3]


def test_shard_made_by_tar_of_the_current_folder(tmp_path):
    folder = tmp_path / "a.b"
    folder.mkdir()
    for i, extension in enumerate(("jpg", "JPEG", "JPG", "png")):
        (folder / f"k{i}.{extension}").write_bytes(png(i))
        (folder / f"k{i}.cls").write_text(str(i))
    (folder / "._k0.jpg").write_bytes(b"what macOS puts beside a file")
    (folder / "k0.info.json").write_text("{}")
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        archive.add(folder, arcname=".")
        archive.add(folder, arcname="a.b")
    source = open_source("wds/toy", str(tmp_path), "train")
    keys = {f"train.tar/{prefix}k{i}": i for prefix in ("", "a.b/") for i in range(4)}
    assert dict(zip(source.names, source.labels.tolist(), strict=True)) == keys
    for i, name in enumerate(source.names):
        assert np.asarray(source.image(i))[0, 0] == keys[name]


def test_first_of_several_images_of_a_sample_is_read(tmp_path):
    write_shard(tmp_path / "t.tar", [("a", "png", png(1)), ("a", "jpg", png(2)), ("a", "cls", b"0")])
    for keys, value in ((None, 2), ("png;jpg", 1)):
        read = index_shards(str(tmp_path), "t", keys).read
        assert len(read.places) == 1
        assert np.asarray(read(0))[0, 0] == value


def test_faults_are_named(root):
    with pytest.raises(ValueError, match=r"no shard \*nonesuch\*\.tar"):
        index_shards(str(root), "nonesuch")
    (root / "broken.tar").write_bytes(b"not a tar" * 200)
    with pytest.raises(ValueError, match=r"broken\.tar is not a plain tar file"):
        index_shards(str(root), "broken")
    write_shard(root / "word.tar", [("a", "png", png(1)), ("a", "cls", b"cat")])
    with pytest.raises(ValueError, match=r"word\.tar: target a\.cls is 'cat', wanted a whole number"):
        index_shards(str(root), "word")
    write_shard(root / "bare.tar", [("a", "bmp", b"1")])
    with pytest.raises(ValueError, match="hold no jpg, jpeg, png, webp image"):
        index_shards(str(root), "bare")
    write_shard(root / "half.tar", [("a", "png", png(1)), ("b", "bmp", png(1)), ("b", "cls", b"1")])
    with pytest.raises(ValueError, match=r"half\.tar: b\.cls has no jpg, jpeg, png, webp image beside it"):
        index_shards(str(root), "half")
    write_shard(root / "twice.tar", [("a", "png", png(1)), ("a", "PNG", png(2))])
    with pytest.raises(ValueError, match=r"twice\.tar: a\.PNG is there twice"):
        index_shards(str(root), "twice")
    with tarfile.open(root / "link.tar", "w") as archive:
        member = tarfile.TarInfo("a.png")
        member.type, member.linkname = tarfile.LNKTYPE, "b.png"
        archive.addfile(member)
    with pytest.raises(ValueError, match=r"link\.tar: a\.png is a link, wanted a file"):
        index_shards(str(root), "link")
    write_shard(root / "cut.tar", [("a", "png", png(1)[:20])])
    with pytest.raises(UnreadableImageError, match="cut"):
        open_source("wds/toy", str(root), "cut").image(0)


def test_a_class_beyond_any_is_refused_before_counts_take_memory(tmp_path):
    write_shard(tmp_path / "train.tar", [("a", "jpg", png(1)), ("a", "cls", b"999999999999")])
    with pytest.raises(UserError, match=r"train\.tar/a: label 999999999999 is over 131,071, the largest that is read"):
        open_source("wds/x", str(tmp_path), "train")


def test_what_is_left_out_is_counted_once_for_all_shards(tmp_path, caplog):
    for n in range(2):
        samples = [
            ("a", "jpg", png(1)),
            ("a", "json", b"{}"),
            ("b", "jpg", png(2)),
            ("b", "json", b"{}"),
            ("._a", "jpg", b""),
        ]
        write_shard(tmp_path / f"train-{n}.tar", samples)
    assert len(index_shards(str(tmp_path), "train").labels) == 4
    (record,) = caplog.records
    assert "left out 4 .json (such as 'train-0.tar/a.json'), 2 hidden (such as 'train-0.tar/._a.jpg')" in record.message
