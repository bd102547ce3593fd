"""The ways in which people keep their images and labels."""

import pytest
from PIL import Image

import train_ssl
from semivim.data import save_split
from semivim.flags.open_data import open_data
from semivim.utils.user_error import UserError


def picture(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (len(name), 0, 0)).save(root / name)


@pytest.fixture
def flat(tmp_path):
    """A folder of class folders, one of a single image, without folders of splits."""
    root = tmp_path / "flat"
    picture(root, *(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(10)), "fox/0.png")
    picture(tmp_path / "heap", "a.png", "deep/b.png")
    return root


def opened(root, *words, folder=None):
    words = ["--data-dir", str(root), *map(str, words)]
    return open_data(train_ssl.parse_args(words), folder)


def test_a_flat_folder_holds_out_its_validation_images(flat, tmp_path):
    with pytest.raises(
        UserError, match="'train' has no folder of its own in --data-dir.*train_ssl.py --val-fraction 0.1"
    ):
        opened(flat, "--labels-per-class", 2)
    source, val_source, split = opened(flat, "--labels-per-class", 2, "--val-fraction", 0.2)
    assert (len(source), val_source.labels.tolist()) == (21, [0, 0, 1, 1])
    assert source.class_names == val_source.class_names == ["cat", "dog", "fox"]
    trained = {source.describe(i) for i in [*split.labelled, *split.unlabelled]}
    assert not trained & {val_source.describe(i) for i in range(4)} and len(trained) == 17
    assert split.labels_per_class.tolist() == [2, 2, 1]
    save_split(split, tmp_path)
    again = opened(flat, "--labels-per-class", 2, "--val-fraction", 0.2, folder=tmp_path)
    assert again[2].sha256 == split.sha256
    assert [again[1].describe(i) for i in range(4)] == [val_source.describe(i) for i in range(4)]
    other = opened(flat, "--labels-per-class", 2, "--val-fraction", 0.2, "--split-seed", 1)
    assert other[2].validation.tolist() != split.validation.tolist()


def test_all_labelled_images_and_a_heap_need_no_split_flag(flat, tmp_path):
    source, _, split = opened(flat, "--val-fraction", 0.2, "--unlabeled-dir", tmp_path / "heap")
    assert split.labels_per_class.tolist() == [8, 8, 1]
    assert [source.describe(i) for i in split.unlabelled] == [
        str(tmp_path / "heap" / n) for n in ("a.png", "deep/b.png")
    ]


def test_a_folder_with_splits_holds_out_training_images_only(tmp_path):
    picture(tmp_path, *(f"train/{name}/{i}.png" for name in ("cat", "dog") for i in range(4)), "validation/cat/9.png")
    source, val_source, _ = opened(tmp_path, "--label-fraction", 0.5, "--val-fraction", 0.25)
    assert (len(source), len(val_source)) == (8, 2)


def test_a_table_labels_a_folder_without_classes(tmp_path):
    """As competitions publish it: one folder of images, one table of names and classes."""
    picture(tmp_path / "images", *(f"{i}.jpg" for i in range(8)))
    table = tmp_path / "train.csv"
    table.write_text("image_id,breed,label\n0,x,dog\n1,x,cat\n2,x,cat\n")
    val_table = tmp_path / "val.csv"
    val_table.write_text("image_id,label\n6,cat\n7,dog\n")
    words = ["--labeled-list", table, "--val-list", val_table]
    source, val_source, split = opened(tmp_path / "images", *words)
    assert source.class_names == ["cat", "dog"]
    assert {source.names[i]: split.labels[i] for i in split.labelled} == {"0.jpg": 1, "1.jpg": 0, "2.jpg": 0}
    assert [source.names[i] for i in split.unlabelled] == ["3.jpg", "4.jpg", "5.jpg"]
    assert (val_source.names, val_source.labels.tolist()) == (["6.jpg", "7.jpg"], [0, 1])
    save_split(split, tmp_path, source.names)
    _, again, _ = opened(tmp_path / "images", *words, folder=tmp_path)
    assert (again.names, again.labels.tolist()) == (val_source.names, [0, 1])
    val_table.write_text("image_id,label\n2,cat\n")
    with pytest.raises(UserError, match="1 images are to train on and to validate"):
        opened(tmp_path / "images", *words)


def test_a_list_of_validation_images_beside_a_drawn_split(flat, tmp_path):
    (tmp_path / "val.txt").write_text("# held out\ncat/3.png\ndog/4.png\n")
    source, val_source, split = opened(flat, "--labels-per-class", 9, "--val-list", tmp_path / "val.txt")
    assert val_source.names == ["cat/3.png", "dog/4.png"]
    assert split.labels_per_class.tolist() == [9, 9, 1]
    assert not {source.names[i] for i in split.labelled} & set(val_source.names)
