import builtins
import gc
import os
import pickle
import re
import struct
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import STL10

from semivim.data.source_parts import check_sources, join_sources
from semivim.data.sources import ImageSource, UnreadableImageError, open_source, open_unlabelled_folder
from tests.hub_client import shared_client, shared_hub
from tests.hub_server import Fault

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
    source = open_source("", str(write_images(["cat/1.png", "2.png", "dog/3.png"])), ".")
    assert dict(zip(source.names, source.labels.tolist(), strict=True)) == {"2.png": -1, "cat/1.png": 0, "dog/3.png": 1}
    assert source.class_names == ["cat", "dog"]


def test_flat_folder_has_no_labels(write_images):
    source = open_source("", str(write_images(["b.png", "a.png"])), ".")
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
    # torchvision takes any other name for the test set.
    assert len(open_source("torch/fashion_mnist", str(tmp_path), "validation")) == 12
    with pytest.raises(ValueError, match="split 'trian' of 'torch/fashion_mnist' does not exist; wanted 'train' or"):
        open_source("torch/fashion_mnist", str(tmp_path), "trian")


def test_hugging_face_dataset(write_images, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = write_images(["train/cat/1.png", "train/dog/2.png", "train/dog/3.png"])
    source = open_source(f"hfds/{root}", str(tmp_path / "cache"), "train", num_classes=2)
    assert source.labels.tolist() == [0, 1, 1]
    assert source.class_names == ["cat", "dog"]
    assert [grey(source, i) for i in range(3)] == [0, 10, 20]
    for options, message in (
        ({"target_key": "none"}, "split 'train': KeyError 'none'"),
        ({"input_key": "none"}, r"no image in column 'none' \(--input-key\) of image, label, none"),
        ({"class_map": str(tmp_path / "none.txt")}, "Cannot locate specified class map file"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(f"hfds/{root}", str(tmp_path / "cache"), "train", **options)
    assert source.read(0).fp is not None  # not decoded yet, so that a huge one can be shrunk
    source = ImageSource(source.read, [0])
    source.read.reader.dataset = [{"image": None}]
    with pytest.raises(UnreadableImageError, match="image 0 is unreadable"):
        source.image(0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves the table open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_hugging_face_labels_of_text_become_classes(write_images, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = write_images(["train/1.png", "train/2.png", "train/3.png"])
    (root / "train" / "metadata.csv").write_text("file_name,label\n1.png,dog\n2.png,cat\n3.png,dog\n")
    source = open_source(f"hfds/{root}", str(tmp_path / "cache"), "train", num_classes=2)
    assert (source.labels.tolist(), source.class_names) == ([1, 0, 1], ["cat", "dog"])
    gc.collect()  # datasets leaves metadata.csv open


def test_a_hugging_face_data_set_that_the_hub_does_not_give_is_one_line():
    hub = shared_hub()
    hub.fault = Fault("(GET|HEAD) /", 500)
    code = "from semivim.data import open_source\nopen_source('hfds/org/nothing', split='train')"
    try:
        answer = shared_client().run(code)
    finally:
        hub.fault = None
    assert re.match(rf"HubError: org/nothing: {hub.url}/.*: 500 Internal Server Error", answer.line)
    assert answer.seconds < 20


def test_stl10_brings_its_unlabelled_images(tmp_path, monkeypatch):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for name, count in (("train", 4), ("unlabeled", 6), ("test", 2)):
        np.full((count, 3, 96, 96), count, dtype=np.uint8).tofile(folder / f"{name}_X.bin")
    np.array([1, 2, 10, 1], dtype=np.uint8).tofile(folder / "train_y.bin")
    np.array([3, 4], dtype=np.uint8).tofile(folder / "test_y.bin")
    (folder / "class_names.txt").write_text("\n".join(f"class{i}" for i in range(10)))
    with pytest.raises(
        ValueError, match="dataset 'torch/stl10' in --data-dir '.*', split 'train': Dataset not found or corrupted"
    ):
        open_source("torch/stl10", str(tmp_path), "train")
    monkeypatch.setattr(STL10, "_check_integrity", lambda self: True)
    train, test = (open_source("torch/stl10", str(tmp_path), split) for split in ("train", "validation"))
    assert train.labels.tolist() == [0, 1, 9, 0] + [-1] * 6
    assert (train.num_classes, test.labels.tolist()) == (10, [2, 3])
    assert [train.image(i).getpixel((0, 0)) for i in (0, 9)] == [(4, 4, 4), (6, 6, 6)]
    check_sources(train, test, "validation")
    with pytest.raises(ValueError, match="split 'trian' of 'torch/stl10' does not exist"):
        open_source("torch/stl10", str(tmp_path), "trian")


def test_digits_are_1297_and_50_of_each_class():
    train, test = open_source("embedded/digits", split="train"), open_source("embedded/digits", split="validation")
    assert (len(train), len(test)) == (1297, 500)
    assert np.bincount(test.labels).tolist() == [50] * 10
    everything = [source.image(i).tobytes() for source in (train, test) for i in range(len(source))]
    assert len(set(everything)) == 1797, "an image is in both parts"
    image = train.image(0)
    assert (image.mode, image.size) == ("L", (32, 32))
    assert max(np.asarray(train.image(i)).max() for i in range(100)) == 255
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
        ("hfids/imagenet", "is a stream: a label split needs images by index; wanted '' \\(a folder or .tar"),
        ("hfids/mnist", "is a stream"),
        ("TFDS/cifar10", "is a stream"),
        ("embedded/letters", "wanted 'embedded/digits'"),
        ("embedded/digits", "--data-dir '.*' is not read with dataset 'embedded/digits'"),
        ("trch/cifar10", "is not known; wanted '' .*, 'torch/<name>', 'hfds/<name>', 'wds/<name>'.*; did you mean "),
        ("cifar10", "'cifar10' is not known"),
        ("/cifar10", "'/cifar10' is not known"),
        ("Torch/fashionmnist", "Unknown torchvision dataset fashionmnist; did you mean torch/fashion_mnist"),
        ("torch/imagefolder", "did you mean torch/image_folder"),
        ("trch/folder", "did you mean torch/folder"),
        ("torch/cifar10", "dataset 'torch/cifar10' in --data-dir .*not found or corrupted"),
    ],
)
def test_sources_that_cannot_be(tmp_path, dataset, message):
    with pytest.raises(ValueError, match=message):
        open_source(dataset, str(tmp_path), "train")


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (
            "embedded/digits",
            {"class_map": "map.txt"},
            "--class-map 'map.txt' is not read with dataset 'embedded/digits'",
        ),
        ("torch/fashion_mnist", {"class_map": "map.txt"}, "--class-map 'map.txt' is not read"),
        ("torch/fashion_mnist", {"target_key": "coarse"}, "--target-key 'coarse' is not read"),
        ("wds/toy", {"class_map": "map.txt"}, "--class-map 'map.txt' is not read"),
        ("", {"target_key": "coarse"}, "--target-key 'coarse' is not read with dataset ''"),
        ("folder", {"download": True}, "--dataset-download True is not read"),
    ],
)
def test_options_that_nothing_reads(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        open_source(dataset, None, **options)


def test_split_needs_a_folder_of_its_own(write_images):
    root = write_images(["validation/cat/1.png", "validation/dog/2.png", ".hidden/cat/3.png"])
    wanted = r"split 'trian' has no folder of its own in --data-dir '.*', which holds validation; where its folders are"
    for dataset in ("", "folder", "torch/image_folder"):
        with pytest.raises(ValueError, match=wanted):
            open_source(dataset, str(root), "trian")
    with pytest.raises(ValueError, match="split 'train' has no folder"):
        open_source("", str(root))
    assert len(open_source("", str(root), "val")) == 2  # timm's synonyms
    assert len(open_source("", str(root / "validation"), ".")) == 2
    with pytest.raises(ValueError, match="which holds no folder"):
        open_source("", str(root / "validation" / "cat"))


def test_missing_places_are_named(tmp_path):
    for dataset in ("", "torch/cifar10"):
        with pytest.raises(ValueError, match="--data-dir '.*nowhere' does not exist"):
            open_source(dataset, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="dataset '' needs --data-dir"):
        open_source("")
    with pytest.raises(ValueError, match="--unlabeled-dir '.*nowhere' is not a directory"):
        open_unlabelled_folder(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="folder '.*' holds no image"):
        open_unlabelled_folder(str(tmp_path))
    with pytest.raises(ValueError, match="split 'trian' of 'embedded/digits' does not exist"):
        open_source("embedded/digits", split="trian")


def test_more_classes_than_the_model_has(write_images):
    with pytest.raises(ValueError, match="--num-classes is 1, but dataset .* has 2 classes"):
        open_source("", str(write_images(FOLDERS)), "train", num_classes=1)


def test_empty_class_folder_would_shift_labels_and_is_refused(write_images):
    root = write_images(["train/cat/1.png", "train/fox/2.png"])
    (root / "train/dog").mkdir()
    with pytest.raises(ValueError, match="class folders without an image that Pillow reads in .*: dog"):
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
    joined = join_sources(open_source("", str(root / "lab"), "."), open_unlabelled_folder(str(root / "more")))
    assert joined.labels.tolist() == [0, 1, -1]
    assert [grey(joined, i) for i in range(3)] == [0, 10, 20]
    assert joined.class_names == ["cat", "dog"]
    assert joined.describe(2) == str(root / "more/3.png")
    train, test = (open_source("embedded/digits", split=split) for split in ("train", "test"))
    for second in (test, open_unlabelled_folder(str(root / "more"))):
        assert join_sources(train, second).names is None


# What may be trained on, and validated on


@pytest.fixture
def data_dir(write_images):
    return write_images([*FOLDERS, "heap/6.png"])


def test_training_on_validation_images_is_refused(data_dir):
    val = open_source("", str(data_dir), "val")
    (data_dir / "again").symlink_to(data_dir / "val")
    (data_dir / "part").mkdir()
    (data_dir / "part/cat").symlink_to(data_dir / "val/cat")
    (data_dir / "part/dog").symlink_to(data_dir / "train/dog")
    sources = [open_source("", str(data_dir), split) for split in ("val", "again", "part")]
    sources += [open_unlabelled_folder(str(data_dir / folder)) for folder in ("val", "val/cat", "again", ".")]
    for source in sources:
        with pytest.raises(ValueError, match=f"split 'val' shares {data_dir}/val/cat"):
            check_sources(source, val, "val", 2)
    for source in (open_source("", str(data_dir), "train"), open_unlabelled_folder(str(data_dir / "heap"))):
        check_sources(source, val, "val", 2)


def test_unlabelled_images_may_not_count_twice(data_dir):
    train = open_source("", str(data_dir), "train")
    for folder in ("train", "train/dog", "."):
        with pytest.raises(ValueError, match=f"would count twice: both hold {data_dir}/train/(cat|dog)"):
            join_sources(train, open_unlabelled_folder(str(data_dir / folder)))


def test_images_without_names_are_told_apart_by_labels_and_the_first_image():
    train, test = (open_source("embedded/digits", split=split) for split in ("train", "validation"))
    check_sources(train, test, "validation")
    with pytest.raises(ValueError, match="split 'training' shares all its 1,297 images"):
        check_sources(train, open_source("embedded/digits", split="training"), "training")
    other = ImageSource(lambda index: train.image(index + 1), train.labels)
    check_sources(train, other, "validation")


def test_labels_beyond_the_model_are_refused_before_training():
    def numbered(*labels):
        return ImageSource(lambda index: Image.new("L", (1, 1), index), labels)

    with pytest.raises(ValueError, match="validation label 3 of image 1 is out of range for --num-classes 3"):
        check_sources(numbered(0, 1, 2), numbered(0, 3), "val")
    check_sources(numbered(0, 1, 2), numbered(0, 3), "val", 4)
    with pytest.raises(ValueError, match="training label 4 of image 2 is out of range for --num-classes 4"):
        check_sources(numbered(0, 1, 4), numbered(0, 3), "val", 4)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_class_folder_of_one_split_only(data_dir, split):
    (data_dir / split / "fox").mkdir(parents=True)
    (data_dir / "train/cat/1.png").rename(data_dir / split / "fox/1.png")
    if split == "validation":
        (data_dir / "val/cat").rename(data_dir / "validation/cat")
        (data_dir / "val/dog").rename(data_dir / "validation/dog")
    train, val = (open_source("", str(data_dir), part) for part in ("train", "validation"))
    with pytest.raises(ValueError, match="the first that differs is 'fox'"):
        check_sources(train, val, "validation")


def test_classes_in_another_order():
    one, two = (ImageSource(None, [0], names, ["1.png"], root) for names, root in (("ab", "/train"), ("ba", "/val")))
    with pytest.raises(ValueError, match="training has 2 classes and validation 2, the first that differs is 'a'"):
        check_sources(one, two, "val")


def test_labels_must_be_whole_numbers():
    for labels in (["cat"], [0.5], [[1], [2]], [True]):
        with pytest.raises(ValueError, match="labels must be one whole number an image, got"):
            ImageSource(None, labels)


# Folders as they come


def test_class_map(write_images, tmp_path):
    root = str(write_images(["train/cat/1.png", "train/dog/2.png", "train/fox/3.png", "train/4.png"]))
    (tmp_path / "map.txt").write_text("dog\nwolf\ncat\n\n")  # a blank last line is no class
    source = open_source("", root, "train", 3, class_map=str(tmp_path / "map.txt"))
    assert dict(zip(source.names, source.labels.tolist(), strict=True)) == {
        "cat/1.png": 2,
        "dog/2.png": 0,
        "4.png": -1,
    }
    assert source.class_names == ["dog", "wolf", "cat"]
    (tmp_path / "map.pkl").write_bytes(pickle.dumps({"cat": 5, "dog": 5, "fox": 7}))
    source = open_source("", root, "train", 8, class_map=str(tmp_path / "map.pkl"))
    assert sorted(source.labels) == [5, 5, 7]
    assert source.class_names is None
    assert source.num_classes == 8
    (tmp_path / "map.pkl").write_bytes(pickle.dumps({"fox": 2, "cat": 0, "dog": 1}))
    assert open_source("", root, class_map=str(tmp_path / "map.pkl")).class_names == ["cat", "dog", "fox"]


def test_faults_of_a_class_map_are_named(write_images, tmp_path):
    root = str(write_images(["train/cat/1.png", "train/dog/2.png"]))
    path = tmp_path / "map.pkl"
    for content, message in (
        (b"no pickle", "--class-map '.*map.pkl': invalid load key"),
        (pickle.dumps(["cat"]), "expected a dict"),
        (pickle.dumps({"cat": 0, "dog": "1"}), "--class-map gives class 'dog' the label '1', wanted a whole number"),
        (pickle.dumps({"cat": 0, "dog": -1}), "--class-map gives class 'dog' the label -1"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            open_source("", root, "train", class_map=str(path))


def test_tars_that_cannot_be(write_images, tmp_path):
    path = tmp_path / "data.tar"
    path.write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match="data.tar is not a plain tar file: invalid header"):
        open_source("", str(path))
    with tarfile.open(path, "w") as tar:
        tar.add(write_images(["cat/1.png"]), arcname=".")
    with pytest.raises(ValueError, match="unexpected keyword argument 'input_key'"):
        open_source("", str(path), input_key=".png")


def test_training_images_need_classes(write_images):
    root = write_images(["flat/1.png", "val/cat/2.png"])
    flat, val = (open_source("", str(root), split) for split in ("flat", "val"))
    with pytest.raises(ValueError, match="training images have no classes: wanted a folder for each"):
        check_sources(flat, val, "val")
    check_sources(flat, val, "val", 1)


def test_odd_file_names(write_images):
    names = ["train/ca t/ä b.png", "train/ca t/\u202f1\n2.png", "train/dog/\udcff.png"]
    source = open_source("", str(write_images(names)))
    assert source.labels.tolist() == [0, 0, 1]
    assert {grey(source, i) for i in range(3)} == {0, 10, 20}


def test_hidden_folder_is_no_class(write_images):
    hidden = ["cat/.ipynb_checkpoints/1.png", ".Trash/1.png", "__MACOSX/cat/1.png", "cat/._1.png", "dog/__MACOSX/1.png"]
    root = write_images([f"train/{name}" for name in ("cat/1.png", "dog/2.png", *hidden)])
    for dataset in ("", "torch/image_folder"):
        source = open_source(dataset, str(root))
        assert source.names == ["cat/1.png", "dog/2.png"]
        assert source.class_names == ["cat", "dog"]
    assert open_unlabelled_folder(str(root / "train")).names == ["cat/1.png", "dog/2.png"]


def test_class_is_the_folder_below_the_split(write_images, caplog):
    root = write_images([f"train/{name}/1.png" for name in ("cat", "cat/more", "dog/p1/left", "dog/p2")])
    source = open_source("", str(root))
    assert source.names == ["cat/1.png", "cat/more/1.png", "dog/p1/left/1.png", "dog/p2/1.png"]
    assert source.labels.tolist() == [0, 0, 1, 1]
    assert source.class_names == ["cat", "dog"]
    assert [r.getMessage() for r in caplog.records] == [
        f"{root}/train: 3 images lie deeper: those in 'cat/more' are of class 'cat'"
    ]


@pytest.mark.parametrize("extension", ["webp", "bmp", "tif", "TIFF", "gif", "jp2", "ppm", "tga", "ico", "avif"])
def test_every_format_of_pillow_is_read(write_images, extension):
    root = write_images([f"train/cat/1.{extension}", "train/dog/2.png"])
    source = open_source("", str(root))
    assert source.names == [f"cat/1.{extension}", "dog/2.png"]
    assert grey(source, 0) == 0
    assert open_unlabelled_folder(str(root)).names == [f"train/cat/1.{extension}", "train/dog/2.png"]


def test_folder_reads_only_the_extensions_of_input_key(write_images):
    root = write_images(["train/cat/1.webp", "train/cat/1.PNG", "train/dog/2.png", "train/dog/2.jpg"])
    assert open_source("", str(root), input_key=".png;.webp").names == ["cat/1.PNG", "cat/1.webp", "dog/2.png"]


def test_order_is_the_same_on_every_file_system(write_images, monkeypatch):
    names = ["a1.png", "a01.png", "A1.png", "a001.png", "B2.png", "b2.png", "b10.png"]
    root = write_images([f"train/cat/{name}" for name in names])
    expected = [f"cat/{name}" for name in ("A1.png", "a001.png", "a01.png", "a1.png", "B2.png", "b2.png", "b10.png")]
    walk = os.walk
    for turn in (1, -1):
        monkeypatch.setattr(
            os, "walk", lambda *a, turn=turn, **k: ((d, s, sorted(f)[::turn]) for d, s, f in walk(*a, **k))
        )
        assert open_source("", str(root)).names == expected
        assert open_unlabelled_folder(str(root / "train")).names == expected
    (root / "train/Cat").mkdir()
    (root / "train/cat/a1.png").rename(root / "train/Cat/a1.png")
    with pytest.raises(ValueError, match="classes 'Cat' and 'cat' differ in case or zeros only"):
        open_source("", str(root))


def test_links_in_a_circle(write_images):
    root = write_images(["train/cat/1.png", "train/dog/2.png", "train/dog/.3.png"])
    assert open_source("", str(root)).labels.tolist() == [0, 1]
    (root / "train/dog/round").symlink_to(root / "train")
    with pytest.raises(ValueError, match="lead to one folder of images by several ways"):
        open_source("", str(root))
    assert open_unlabelled_folder(str(root)).names == ["train/cat/1.png", "train/dog/2.png"]
    (root / "outside").mkdir()
    (root / "outside/link").symlink_to(root / "train/cat")
    assert open_unlabelled_folder(str(root / "outside")).names == ["link/1.png"]


def test_tar_of_the_current_folder(write_images, tmp_path):
    root = write_images(["cat/1.png", "dog/3.png", "2.png"])
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        tar.add(root, arcname=".")
    source = open_source("", str(tmp_path / "data.tar"))
    assert dict(zip(source.names, source.labels.tolist(), strict=True)) == {
        "cat/1.png": 0,
        "dog/3.png": 1,
        "2.png": -1,
    }
    assert source.class_names == ["cat", "dog"]
