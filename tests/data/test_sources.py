import builtins
import gzip
import struct
import sys
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from semivim.data.sources import (
    UnreadableImageError,
    join_sources,
    open_source,
    open_unlabelled_folder,
    select_images,
)

FOLDERS = ["train/cat/1.png", "train/cat/2.png", "train/dog/3.png", "val/cat/4.png", "val/dog/5.png"]


def grey(source, index):
    return np.asarray(source.image(index).convert("L"))[0, 0]


def test_class_folders(write_images):
    root = write_images(FOLDERS)
    train, val = (open_source("", str(root), split, num_classes=2) for split in ("train", "validation"))
    assert train.names == ["cat/1.png", "cat/2.png", "dog/3.png"]
    assert train.labels.tolist() == [0, 0, 1]
    assert train.class_names == val.class_names == ["cat", "dog"]
    assert [grey(train, i) for i in range(3)] == [0, 10, 20]
    assert [grey(val, i) for i in range(2)] == [30, 40]
    assert open_source("folder", str(root), "train").labels.tolist() == [0, 0, 1]


def test_images_outside_class_folders_have_no_label(write_images):
    source = open_source("", str(write_images(["cat/1.png", "2.png", "dog/3.png"])))
    assert dict(zip(source.names, source.labels.tolist(), strict=True)) == {"2.png": -1, "cat/1.png": 0, "dog/3.png": 1}
    assert source.class_names == ["cat", "dog"]


def test_flat_folder_has_no_labels(write_images):
    source = open_source("", str(write_images(["b.png", "a.png"])))
    assert source.labels.tolist() == [-1, -1]
    assert source.num_classes == 0


def test_torchvision_folder_agrees_with_timms(write_images):
    root = str(write_images(FOLDERS))
    ours, theirs = open_source("", root, "train"), open_source("torch/image_folder", root, "train")
    assert theirs.names == ours.names
    assert theirs.labels.tolist() == ours.labels.tolist()
    assert theirs.class_names == ours.class_names


def test_tar(write_images, tmp_path):
    root = write_images(["cat/1.png", "dog/3.png", "cat/2.png"])
    path = tmp_path / "data.tar"
    with tarfile.open(path, "w") as tar:
        for folder in ("cat", "dog"):
            tar.add(root / folder, arcname=folder)
    source = open_source("", str(path))
    assert source.names == ["cat/1.png", "cat/2.png", "dog/3.png"]
    assert source.labels.tolist() == [0, 0, 1]
    assert [grey(source, i) for i in range(3)] == [0, 20, 10]
    source.read.reader.tar_state.tf.close()  # timm keeps it open for the next image


def test_fashion_mnist_as_torchvision_keeps_it(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
    labels = np.arange(12, dtype=np.uint8) % 10
    for stem in ("train", "t10k"):
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, 12, 28, 28) + pixels.tobytes())
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 12) + labels.tobytes())
    source = open_source("torch/fashion_mnist", str(tmp_path), "train", num_classes=10)
    assert source.labels.tolist() == labels.tolist()
    assert source.class_names[9] == "Ankle boot"
    assert np.array_equal(np.asarray(source.image(5)), pixels[5])
    assert source.names is None
    assert source.describe(5) == "image 5"


def test_hugging_face_dataset(write_images, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = write_images(["train/cat/1.png", "train/dog/2.png", "train/dog/3.png"])
    source = open_source(f"hfds/{root}", str(tmp_path / "cache"), "train", num_classes=2)
    assert source.labels.tolist() == [0, 1, 1]
    assert source.class_names == ["cat", "dog"]
    assert [grey(source, i) for i in range(3)] == [0, 10, 20]


def test_digits_are_1297_and_50_of_each_class():
    train, test = open_source("embedded/digits", split="train"), open_source("embedded/digits", split="validation")
    assert (len(train), len(test)) == (1297, 500)
    assert np.bincount(test.labels).tolist() == [50] * 10
    everything = [source.image(i).tobytes() for source in (train, test) for i in range(len(source))]
    assert len(set(everything)) == 1797, "an image is in both parts"
    image = train.image(0)
    assert (image.mode, image.size) == ("L", (32, 32))
    assert np.asarray(image).max() > 200
    again = open_source("embedded/digits", split="train")
    assert np.array_equal(again.labels, train.labels)
    assert again.image(77).tobytes() == train.image(77).tobytes()


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "sklearn.datasets", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"needs scikit-learn: pip install 'semivim\[demo\]'"):
        open_source("embedded/digits")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("hfids/imagenet", "is a stream: a label split needs images by index; wanted a folder or .tar"),
        ("hfids/mnist", "is a stream"),
        ("TFDS/cifar10", "is a stream"),
        ("embedded/letters", "wanted 'embedded/digits'"),
        ("torch/fashionmnist", "Unknown torchvision dataset fashionmnist"),
        ("torch/cifar10", "dataset 'torch/cifar10' in data_dir .*not found or corrupted"),
        ("", "Found 0 images"),
    ],
)
def test_sources_that_cannot_be(tmp_path, dataset, message):
    with pytest.raises(ValueError, match=message):
        open_source(dataset, str(tmp_path), "train")


def test_missing_places_are_named(tmp_path):
    for dataset in ("", "torch/cifar10"):
        with pytest.raises(ValueError, match="data_dir '.*nowhere' does not exist"):
            open_source(dataset, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="data_dir None does not exist"):
        open_source("")
    with pytest.raises(ValueError, match="unlabelled folder '.*nowhere' is not a directory"):
        open_unlabelled_folder(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="unlabelled folder '.*' holds no image"):
        open_unlabelled_folder(str(tmp_path))
    with pytest.raises(ValueError, match="split 'trian' of 'embedded/digits' does not exist"):
        open_source("embedded/digits", split="trian")


def test_more_classes_than_the_model_has(write_images):
    with pytest.raises(ValueError, match="num_classes is 1, but dataset '' has 2 classes"):
        open_source("", str(write_images(FOLDERS)), "train", num_classes=1)


def test_empty_class_folder_would_shift_labels_and_is_refused(write_images):
    root = write_images(["train/cat/1.png", "train/fox/2.png"])
    (root / "train/dog").mkdir()
    with pytest.raises(ValueError, match="class folders without an image in .*: dog"):
        open_source("", str(root), "train")


def test_unlabelled_folder_ignores_sub_folders(write_images):
    root = write_images(["x10.png", "x9.png", "deep/er/1.jpg"])
    (root / "notes.txt").write_text("no image")
    source = open_unlabelled_folder(str(root))
    assert source.names == ["deep/er/1.jpg", "x9.png", "x10.png"]
    assert source.labels.tolist() == [-1] * 3
    assert grey(source, 2) == 0


def test_joined_sources_keep_images_labels_and_names(write_images):
    root = write_images(["lab/cat/1.png", "lab/dog/2.png", "more/3.png"])
    joined = join_sources(open_source("", str(root / "lab")), open_unlabelled_folder(str(root / "more")))
    assert joined.labels.tolist() == [0, 1, -1]
    assert [grey(joined, i) for i in range(3)] == [0, 10, 20]
    assert joined.class_names == ["cat", "dog"]
    assert joined.describe(2) == str(root / "more/3.png")
    digits = open_source("embedded/digits")
    assert join_sources(digits, digits).names is None


def test_selected_images(write_images):
    source = open_source("", str(write_images(["a/1.png", "a/2.png", "b/3.png"])))
    part = select_images(source, np.array([2, 0]), np.array([-1, 0]))
    assert part.names == ["b/3.png", "a/1.png"]
    assert part.labels.tolist() == [1, 0]
    assert [grey(part, i) for i in range(2)] == [20, 0]


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
    source = open_source("", str(root))
    damage(root / "b/bad.png")
    with pytest.raises(UnreadableImageError, match=r"b/bad.png is unreadable: \S"):
        source.image(1)
    assert grey(source, 0) == 0
