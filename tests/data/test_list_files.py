import os

import numpy as np
import pytest

from semivim.data.list_files import listed_classes, read_list, split_from_lists
from semivim.data.sources import open_source, open_unlabelled_folder

NAMES = [f"train/n0{c}/n0{c}_{i}.png" for c in range(3) for i in (2, 10, 1)]


@pytest.fixture
def data_dir(write_images):
    return str(write_images([*NAMES, "val/n00/n00_7.png"]))


@pytest.fixture
def source(data_dir):
    return open_source("", data_dir, "train")


@pytest.fixture
def write_list(tmp_path):
    def write(*lines, name="list.txt"):
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return write


def listed_names(source, path, data_dir=None):
    return [source.names[position] for position in read_list(path, source, 3, data_dir).positions]


def test_bare_file_names(source, write_list):
    path = write_list("n01_10.png", "", "n00_2.png")
    assert listed_names(source, path) == ["n01/n01_10.png", "n00/n00_2.png"]
    assert read_list(path, source, 3).labels.tolist() == [-1, -1]


def test_paths_with_labels_from_the_root_of_data_or_split(source, data_dir, write_list):
    path = write_list("train/n01/n01_10.png 1", "n00/n00_2.png 0")
    listed = read_list(path, source, 3, data_dir)
    assert [source.names[position] for position in listed.positions] == ["n01/n01_10.png", "n00/n00_2.png"]
    assert listed.labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"line 1: 'train/n01/n01_10.png' is not an image below .*train"):
        read_list(path, source, 3)


def test_index_counts_in_torchvisions_order(source, data_dir, write_list):
    from torchvision.datasets import ImageFolder

    reference = ImageFolder(os.path.join(data_dir, "train"))
    path = write_list("Index", "1", "8", "3", name="list.csv")
    expected = [os.path.relpath(reference.samples[i][0], reference.root) for i in (1, 8, 3)]
    assert listed_names(source, path) == expected
    # timm orders x_2 before x_10, torchvision after: a list read in timm's order would name other images.
    assert expected != [source.names[i] for i in (1, 8, 3)]


def test_index_may_be_one_of_several_columns(source, write_list):
    path = write_list("label, Index ", "0, 0 ", "1,3", name="list.csv")
    assert listed_names(source, path) == ["n00/n00_1.png", "n01/n01_1.png"]


def test_index_of_images_without_names(write_list):
    digits = open_source("embedded/digits")
    path = write_list("Index", "5", "1296", name="list.csv")
    assert read_list(path, digits, 10).positions.tolist() == [5, 1296]
    with pytest.raises(ValueError, match="the images of this data set have no names; wanted 'Index'"):
        read_list(write_list("a.png"), digits, 10)


def test_names_with_spaces(write_images, write_list):
    source = open_unlabelled_folder(str(write_images(["my dir/a 1.png", "my dir/b 2.png"])))
    listed = read_list(write_list("my dir/b 2.png", "my dir/a 1.png 2"), source, 3)
    assert [source.names[position] for position in listed.positions] == ["my dir/b 2.png", "my dir/a 1.png"]
    assert listed.labels.tolist() == [-1, 2]


def test_windows_line_ends_and_byte_order_mark(source, tmp_path):
    (tmp_path / "list.txt").write_bytes("\ufeffn01_10.png 1 \r\n\r\nn00_2.png 0\r\n".encode())
    assert listed_names(source, str(tmp_path / "list.txt")) == ["n01/n01_10.png", "n00/n00_2.png"]


def test_absolute_paths_below_the_root(source, data_dir, write_list, tmp_path):
    path = write_list(f"{data_dir}/train/n01/n01_10.png 1", f"{data_dir}/train/n00/n00_2.png 0")
    expected = ["n01/n01_10.png", "n00/n00_2.png"]
    assert listed_names(source, path) == expected
    (tmp_path / "alias").symlink_to(data_dir)
    assert listed_names(open_source("", str(tmp_path / "alias"), "train"), path) == expected
    with pytest.raises(ValueError, match="line 1: '.*/val/n00/n00_7.png' is outside the root: wanted .*/root/train"):
        listed_names(source, write_list(f"{data_dir}/val/n00/n00_7.png"))


def test_names_with_what_ends_lines_elsewhere(write_images, write_list):
    source = open_unlabelled_folder(str(write_images(["a\u2028b.png", "c\x0bd.png"])))
    assert listed_names(source, write_list("c\x0bd.png 1", "a\u2028b.png")) == ["c\x0bd.png", "a\u2028b.png"]


def test_list_that_is_no_text(source, tmp_path):
    (tmp_path / "list.txt").write_bytes("größe.png".encode("latin-1"))
    with pytest.raises(ValueError, match=r"list '.*list.txt' is not UTF-8 text: .*0xf6"):
        read_list(str(tmp_path / "list.txt"), source, 3)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["n00/n00_1.png 0", "../secret.png 0"], "line 2: '../secret.png' is outside the root"),
        (["n00/../n01/n01_1.png"], "line 1: 'n00/../n01/n01_1.png' is outside the root"),
        (["n00\\..\\..\\secret.png"], "is outside the root"),
        (["/etc/passwd"], "line 1: '/etc/passwd' is outside the root"),
        (["n00/n00_9.png"], "line 1: 'n00/n00_9.png' is not an image below"),
        (["n00_7.png"], "'n00_7.png' is not an image below"),
        (["n00/n00_1.png 3"], "line 1: label 3 is out of range for --num-classes 3"),
        (["n00/n00_1.png -2"], "line 1: label -2 is out of range"),
        (["n00/n00_1.png 1"], "line 1: class 'n01', but the data set has .*n00/n00_1.png as 'n00'"),
        (["n00/n00_1.png 0", "n01/n01_1.png 1", "n00_1.png"], "line 3: .*n00_1.png is listed before, in line 1"),
        (["Index", "9"], "line 2: index '9' is out of range for 9 images"),
        (["Index", "0", "-1"], "line 3: index '-1' is out of range"),
        (["label,Index", "0"], "line 2: index '' is out of range"),
        (["Index", "1.5"], "line 2: index '1.5' is out of range"),
        (["Index", "4", "4"], "line 3: .* is listed before, in line 2"),
        (["Index"], "names no image"),
        ([""], "names no image"),
    ],
)
def test_entries_that_cannot_be(source, write_list, lines, message):
    with pytest.raises(ValueError, match=f"list '.*{'list.txt'}'.*{message}"):
        read_list(write_list(*lines), source, 3)


def test_missing_list(source, tmp_path):
    with pytest.raises(ValueError, match=r"list '.*none.txt' is not a file"):
        read_list(str(tmp_path / "none.txt"), source, 3)


def test_ambiguous_file_name(write_images, write_list):
    source = open_source("", str(write_images(["a/1.png", "b/1.png"])), ".")
    with pytest.raises(ValueError, match="'1.png' is the name of several images"):
        read_list(write_list("1.png"), source, 2)
    assert listed_names(source, write_list("b/1.png")) == ["b/1.png"]
    source = open_source("", str(write_images(["1.png", "a/1.png"])), ".")
    assert listed_names(source, write_list("1.png")) == ["1.png"]


@pytest.mark.parametrize("what", ["file", "folder"])
def test_links_out_of_the_root_are_refused(write_images, write_list, tmp_path, what):
    root = write_images(["a/1.png", "b/2.png"])
    outside = tmp_path / "outside" / "c"
    outside.mkdir(parents=True)
    (outside / "3.png").write_bytes((root / "a/1.png").read_bytes())
    if what == "file":
        (root / "c").mkdir()
        (root / "c/3.png").symlink_to(outside / "3.png")
    else:
        (root / "c").symlink_to(outside)
    (root / "b/inside.png").symlink_to(root / "a/1.png")
    source = open_source("", str(root), ".")
    assert listed_names(source, write_list("b/inside.png")) == ["b/inside.png"]
    with pytest.raises(ValueError, match=r"line 1: 'c/3.png' is a link to .*outside/c/3.png, outside the root"):
        read_list(write_list("c/3.png 2"), source, 3)


def test_root_reached_through_a_link_is_no_escape(write_images, write_list, tmp_path):
    root = write_images(["a/1.png", "b/2.png"])
    (tmp_path / "alias").symlink_to(root)
    source = open_source("", str(tmp_path / "alias"), ".")
    assert listed_names(source, write_list("a/1.png 0")) == ["a/1.png"]


def test_split_from_both_lists(source, data_dir, write_list):
    labelled = write_list("n00_1.png", "n01_2.png", "n02_10.png", name="labelled.txt")
    split = split_from_lists(source, 3, labelled, data_dir=data_dir)
    assert sorted(source.names[i] for i in split.labelled) == ["n00/n00_1.png", "n01/n01_2.png", "n02/n02_10.png"]
    assert len(split.unlabelled) == 6
    some = write_list("n00_2.png", "n00_10.png", name="unlabelled.txt")
    assert split_from_lists(source, 3, labelled, some).unlabelled.tolist() == [
        source.names.index("n00/n00_2.png"),
        source.names.index("n00/n00_10.png"),
    ]
    with pytest.raises(ValueError, match="1 images are both labelled and unlabelled, the first is .*/n00/n00_1.png; "):
        split_from_lists(source, 3, labelled, write_list("n00_1.png", "n00_2.png", name="both.txt"))
    with pytest.raises(ValueError, match="1 images are to train on and to validate, the first is .*/n02/n02_10.png$"):
        split_from_lists(source, 3, labelled, validation_list=write_list("n02_10.png", name="val.txt"))


def test_a_list_may_be_all_that_is_known_of_the_labels(write_images, write_list):
    source = open_unlabelled_folder(str(write_images([f"{i}.png" for i in range(4)])))
    split = split_from_lists(source, 2, write_list("0.png 1", "2.png 0"))
    assert split.labels.tolist() == [1, -1, 0, -1]
    assert source.labels.tolist() == [-1] * 4
    assert np.array_equal(split.unlabelled, [1, 3])
    with pytest.raises(ValueError, match="/1.png is to be labelled, but its class is not known"):
        split_from_lists(source, 2, write_list("0.png 1", "1.png", "2.png 0"))
    with pytest.raises(ValueError, match="1 of 2 classes have no labelled image: 0"):
        split_from_lists(source, 2, write_list("0.png 1"))
    assert len(split_from_lists(source, 2, write_list("0.png 1"), min_per_class=0).labelled) == 1


@pytest.mark.parametrize(
    "lines",
    [
        ["image_id,label", "n01_10.png,1", "n00/n00_2.png,0"],
        ["label,extra,File_Name", "n01,x,n01_10", "n00,,n00/n00_2"],
        ["id,class", "n01/n01_10,n01", '"n00_2",n00'],
        ["n01_10.png,1", "n00_2.png,0"],
        ["n01_10, n01", "# a comment", "n00_2, n00"],
        ["n01_10\tn01", "n00_2 n00"],
        ["# name and class", "n01_10 1", "n00_2 0"],
        ["filename,label", "n01_10.png,1.0", "n00_2.png,0.0"],
    ],
    ids=lambda lines: lines[0],
)
def test_names_and_labels_as_people_write_them(lines, source, write_list):
    listed = read_list(write_list(*lines, name="list.csv"), source, 3)
    assert [source.names[i] for i in listed.positions] == ["n01/n01_10.png", "n00/n00_2.png"]
    assert listed.labels.tolist() == [1, 0]


def test_names_alone_in_a_table_and_names_with_commas(write_images, write_list):
    source = open_unlabelled_folder(str(write_images(["a,b.png", "c.png", "d.png", "d.jpg"])))
    assert listed_names(source, write_list("path", "c.png", '"a,b.png"')) == ["c.png", "a,b.png"]
    assert listed_names(source, write_list("a,b.png", "c.png,2")) == ["a,b.png", "c.png"]
    with pytest.raises(ValueError, match="line 1: 'd' is the name of several images"):
        listed_names(source, write_list("d,1"))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["image_id,label", "n01_10,n1"],
            r"line 2: 'n1' is not a class \(did you mean 'n01'\?\): wanted one of n00, n01",
        ),
        (["image_id,label", "n01_10"], "line 2: wanted a cell for each column of the header, got 'n01_10'"),
        (["photo,label", "n01_10,n01"], "line 1: no column of images among photo, label: wanted image_id, image, "),
        (["image_id,label", "n01_10,n00"], "line 2: class 'n00', but the data set has .*n01_10.png as 'n01'"),
        (["n01_10,n01,x"], "line 1: 'n01_10,n01,x' is not an image below"),
    ],
)
def test_tables_that_cannot_be(lines, message, source, write_list):
    with pytest.raises(ValueError, match=message):
        read_list(write_list(*lines), source, 3)


def test_a_number_that_is_also_a_name_means_what_the_data_set_says(write_images, write_list):
    source = open_source("", str(write_images(["1/a.png", "2/b.png", "c.png"])), ".")
    assert read_list(write_list("a,1", "b,1"), source, 2).labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match="line 1: '1' is the name of one class and the number of another"):
        read_list(write_list("c,1"), source, 2)


def test_classes_beyond_those_with_a_name_are_numbers(source, write_list):
    with pytest.raises(ValueError, match="line 1: class 4, but the data set has .*n01_10.png as 'n01'"):
        read_list(write_list("n01_10.png 4"), source, 5)


def test_classes_of_a_list(write_list):
    assert listed_classes(write_list("image_id,label", "a,dog10", "b,dog9", "c,dog10")) == ["dog9", "dog10"]
    assert listed_classes(write_list("a.png cat", "b c.png dog", "d.png dog")) == ["cat", "dog"]
    assert listed_classes(write_list("a.png 1", "b.png 0")) is None
    assert listed_classes(write_list("a b.png", "c.png")) is None
