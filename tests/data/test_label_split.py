import hashlib
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semivim.data.label_split import (
    LabelSplit,
    complete_split,
    draw_validation,
    load_split,
    long_tail,
    make_split,
    save_split,
)
from semivim.utils.user_error import UserError


def balanced(per_class=100, num_classes=5):
    return np.tile(np.arange(num_classes), per_class)


def test_fractions_are_nested_and_stratified():
    labels = balanced(1300, 4)
    splits = [make_split(labels, 4, fraction=p, seed=7) for p in (0.01, 0.05, 0.10)]
    assert [split.labels_per_class.tolist() for split in splits] == [[13] * 4, [65] * 4, [130] * 4]
    for small, large in zip(splits, splits[1:], strict=False):
        assert set(small.labelled) < set(large.labelled)
    for split in splits:
        assert np.array_equal(np.union1d(split.labelled, split.unlabelled), np.arange(len(labels)))
        assert not set(split.labelled) & set(split.unlabelled)


def test_seed_and_fold_give_the_same_split_again_and_others_differ():
    labels = balanced()
    first = make_split(labels, 5, per_class=4, seed=1, fold=0)
    assert first.sha256 == make_split(labels, 5, per_class=4, seed=1, fold=0).sha256
    others = {make_split(labels, 5, per_class=4, seed=s, fold=f).sha256 for s, f in ((1, 1), (2, 0), (1, 2), (0, 1))}
    assert len(others | {first.sha256}) == 5


def test_the_draw_is_pinned_across_releases():
    split = make_split(balanced(10, 3), 3, per_class=2, seed=42)
    assert split.labelled.tolist() == [2, 5, 10, 15, 18, 22]


@settings(max_examples=50)
@given(
    st.lists(st.integers(0, 3), min_size=8, max_size=60),
    st.floats(0.01, 1),
    st.integers(1, 3),
    st.integers(0, 1000),
)
def test_every_class_gets_its_share_or_the_minimum(drawn, fraction, minimum, seed):
    labels = np.array([0, 1, 2, 3, *drawn])
    sizes = np.bincount(labels, minlength=4)
    split = make_split(labels, 4, fraction=fraction, min_per_class=minimum, seed=seed)
    for size, count in zip(sizes, split.labels_per_class, strict=True):
        assert count == min(max(int(fraction * size + 0.5), minimum), size)


def test_a_rare_class_keeps_a_label_unless_asked_otherwise():
    labels = np.array([0] * 200 + [1] * 5)
    assert make_split(labels, 2, fraction=0.01).labels_per_class.tolist() == [2, 1]
    split = make_split(labels, 2, fraction=0.01, min_per_class=0)
    assert split.labels_per_class.tolist() == [2, 0]
    assert split.classes_without_label.tolist() == [1]
    assert split.ceiling == 0.5
    assert "classes without labels: 1 (1); balanced accuracy cannot exceed 50.0%" in split.report()


def test_a_class_of_few_images_gives_all_of_them_and_is_named(caplog):
    labels = np.array([0] * 30 + [1] * 3 + [2] * 30 + [3])
    split = make_split(labels, 4, per_class=20, class_names=["ant", "bee", "cat", "dog"])
    assert split.labels_per_class.tolist() == [20, 3, 20, 1]
    assert caplog.messages == ["--labels-per-class 20: 2 classes have fewer images: 'bee' 3, 'dog' 1"]
    caplog.clear()
    assert make_split(labels, 4, per_class=1).labels_per_class.tolist() == [1, 1, 1, 1]
    assert not caplog.messages


def test_messages_name_classes():
    labels, names = np.array([0] * 9 + [2]), ["ant", "bee", "cat"]
    with pytest.raises(ValueError, match="1 of 3 classes have no labelled image: 'bee'; --min-per-class 0 accepts"):
        make_split(labels, 3, fraction=0.5, class_names=names)
    with pytest.raises(ValueError, match="--imb-n1 wants 2 images of class 'bee', only 0 are left"):
        make_split(labels, 3, imb_n1=2, class_names=names)
    split = make_split(labels, 3, fraction=0.5, min_per_class=0, class_names=names)
    assert "classes without labels: 1 ('bee'); balanced" in split.report()


def test_validation_images_are_a_share_of_every_class_and_nothing_else(tmp_path):
    labels = np.array([0] * 40 + [1] * 10 + [2] * 2 + [3] + [-1] * 5)
    held_out = draw_validation(labels, 4, 0.2, seed=3)
    assert np.bincount(labels[held_out], minlength=4).tolist() == [8, 2, 1, 0]
    assert draw_validation(labels, 4, 0.2, seed=3).tolist() == held_out.tolist()
    assert draw_validation(labels, 4, 0.2, seed=4).tolist() != held_out.tolist()
    assert set(held_out) < set(draw_validation(labels, 4, 0.5, seed=3))
    split = make_split(labels, 4, per_class=1, seed=3, validation=held_out)
    assert set(split.labelled) == set(make_split(labels, 4, per_class=1, seed=3).labelled)
    parts = [split.labelled, split.unlabelled, split.validation]
    assert np.concatenate(parts).tolist() != sorted(np.concatenate(parts)) and len(np.concatenate(parts)) == len(labels)
    assert np.array_equal(np.unique(np.concatenate(parts)), np.arange(len(labels)))
    save_split(split, tmp_path)
    read = load_split(tmp_path, labels, 4)
    assert (read.validation == split.validation).all() and read.sha256 == split.sha256
    assert "validation: 11 images held out" in read.report()
    (tmp_path / "validation.txt").unlink()
    with pytest.raises(ValueError, match="is damaged: sha256"):
        load_split(tmp_path, labels, 4)
    with pytest.raises(ValueError, match="1 images are to train on and to validate, the first is image 3"):
        complete_split(labels, 4, [3, 45, 51, 52], [1], validation=[3])
    with pytest.raises(ValueError, match="no class has two images"):
        draw_validation(np.array([0, 1, -1]), 2, 0.5)


def test_more_classes_than_the_data_set_has():
    split = make_split(balanced(10, 2), 3, per_class=4, min_per_class=0)
    assert split.labels_per_class.tolist() == [4, 4, 0]
    with pytest.raises(ValueError, match="1 of 3 classes have no labelled image: 2; --min-per-class 0 accepts"):
        make_split(balanced(10, 2), 3, per_class=4)
    with pytest.raises(
        ValueError, match="11 of 12 classes have no labelled image: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ...;"
    ):
        make_split(balanced(10, 1), 12, per_class=4)


def test_the_smallest_classes_can_be_labelled():
    assert make_split([0, 0, 1], 2, per_class=1).labels_per_class.tolist() == [1, 1]
    assert make_split([0, 0, 1], 2, imb_n1=1).labels_per_class.tolist() == [1, 1]


def test_images_of_unknown_class_are_only_ever_unlabelled():
    labels = np.array([0, 0, 1, 1, -1, -1])
    split = make_split(labels, 2, fraction=1.0)
    assert split.labelled.tolist() == [0, 1, 2, 3]
    assert split.unlabelled.tolist() == [4, 5]


def test_labelled_images_may_be_used_as_unlabelled_too():
    split = make_split(balanced(10, 2), 2, per_class=3, include_labelled=True)
    assert len(split.unlabelled) == 20
    assert split.effective_fraction == 6 / 20
    assert make_split(balanced(10, 2), 2, per_class=3).effective_fraction == 6 / 20


@pytest.mark.parametrize(
    ("first", "factor", "largest", "smallest"), [(1500, 100, 1500, 15), (500, 150, 500, 3), (150, 10, 150, 15)]
)
def test_long_tail_of_the_published_settings(first, factor, largest, smallest):
    counts = long_tail(10, first, factor)
    assert (counts[0], counts[-1]) == (largest, smallest)
    assert (np.diff(counts) <= 0).all()
    k = 4
    assert counts[k] == int(first * factor ** (-k / 9))
    assert long_tail(10, first, -factor).tolist() == counts[::-1].tolist()


def test_long_tailed_split_takes_labelled_first_and_may_reverse_the_rest():
    labels = balanced(60, 4)
    split = make_split(labels, 4, imb_n1=20, imb_factor_l=10, imb_m1=40, imb_factor_u=-20)
    assert split.labels_per_class.tolist() == [20, 9, 4, 2]
    assert np.bincount(labels[split.unlabelled]).tolist() == [2, 5, 14, 40]
    assert not set(split.labelled) & set(split.unlabelled)
    assert split.effective_fraction == 35 / (35 + 61)
    rest = make_split(labels, 4, imb_n1=20, imb_factor_l=10)
    assert np.array_equal(rest.labelled, split.labelled)
    assert len(rest.unlabelled) == 240 - 35


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give exactly one of --label-fraction, --labels-per-class, --imb-n1, got none"),
        ({"fraction": 0.1, "per_class": 4}, "got --label-fraction, --labels-per-class"),
        ({"fraction": 0.0}, r"fraction must be in \(0, 1\], got 0.0"),
        ({"fraction": 1.5}, "got 1.5"),
        ({"fraction": float("nan")}, "got nan"),
        ({"per_class": 0}, "none of the 500 images is labelled"),
        ({"fraction": 0.001, "min_per_class": 0}, "none of the 500 images is labelled"),
        ({"per_class": -1}, "--labels-per-class must not be negative, got -1"),
        ({"fraction": 0.1, "min_per_class": -1}, "--min-per-class must not be negative, got -1"),
        ({"per_class": 4, "min_per_class": -1}, "--min-per-class must not be negative, got -1"),
        (
            {"per_class": 4, "min_per_class": 2},
            "--min-per-class is 2, which only --label-fraction reads; with --labels-per-class it is",
        ),
        ({"fraction": 0.1, "imb_m1": 5}, "--imb-m1 is read only with --imb-n1, got 5"),
        ({"fraction": 0.1, "imb_factor_l": 5.0}, "--imb-factor-l is read only with --imb-n1, got 5.0"),
        ({"per_class": 4, "imb_factor_u": -5.0}, "--imb-factor-u is read only with --imb-n1, got -5.0"),
        ({"imb_n1": 10, "imb_factor_u": 5.0}, "--imb-factor-u is read only with --imb-m1, got 5.0"),
        ({"imb_n1": 0}, "--imb-n1 must be at least 1, got 0"),
        ({"imb_n1": 10, "imb_factor_l": 0.5}, "--imb-factor-l must be at least 1"),
        ({"imb_n1": 10, "imb_factor_l": 100}, "have no labelled image: 3, 4"),
        ({"imb_n1": 60, "imb_m1": 60}, "--imb-m1 wants 60 images of class 0, only 40 are left"),
        ({"imb_n1": 60, "imb_m1": 4, "imb_factor_u": 0.0}, "--imb-factor-u must be at least 1, or at most -1"),
        ({"per_class": 1, "seed": -1}, "--split-seed and --fold must not be negative, got -1 and 0"),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(UserError, match=message):
        make_split(balanced(), 5, **arguments)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2], "label 2 of image 2 is out of range for --num-classes 2"),
        ([0, -2, 1], "label -2 of image 1"),
        ([0, 0, 0], "1 of 2 classes have no labelled image: 1"),
    ],
)
def test_labels_that_cannot_be(labels, message):
    with pytest.raises(ValueError, match=message):
        make_split(np.array(labels), 2, fraction=0.5)


@pytest.mark.parametrize(
    ("labelled", "unlabelled", "message"),
    [
        ([0, 4], None, "labelled index 4 is out of range for 4 images"),
        ([-1, 0], None, "labelled index -1 is out of range"),
        ([0, 0, 1], None, "labelled index 0 is given 2 times"),
        ([0, 1], [2, 9], "unlabelled index 9"),
        ([0, 1], [1, 2], "1 images are both labelled and unlabelled, the first is image 1"),
        ([], None, "none of the 4 images is labelled"),
        ([0, 3], None, "image 3 is to be labelled, but its class is not known"),
    ],
)
def test_positions_that_cannot_be(labelled, unlabelled, message):
    with pytest.raises(ValueError, match=message):
        complete_split(np.array([0, 1, 1, -1]), 2, labelled, unlabelled)


def test_every_image_may_be_labelled(tmp_path):
    split = make_split(balanced(), 5, fraction=1.0)
    assert (len(split.labelled), len(split.unlabelled), split.effective_fraction) == (500, 0, 1.0)
    assert "500 of 500 images (100.00% of those used), 0 unlabelled" in split.report()
    save_split(split, tmp_path)
    assert load_split(tmp_path, balanced(), 5).sha256 == split.sha256


def names(n):
    return [f"class {i % 3}/a b_{i}.png" for i in range(n)]


@pytest.mark.parametrize("with_names", [True, False])
def test_saved_split_comes_back(tmp_path, with_names):
    labels = balanced(20, 3)
    split = make_split(labels, 3, per_class=4, seed=3)
    known = names(60) if with_names else None
    save_split(split, tmp_path, known)
    assert sorted(os.listdir(tmp_path)) == ["labelled.txt", "unlabelled.txt"]
    loaded = load_split(tmp_path, labels, 3, known)
    assert loaded.sha256 == split.sha256
    assert np.array_equal(loaded.labelled, split.labelled)
    assert np.array_equal(loaded.unlabelled, split.unlabelled)
    header, first = (tmp_path / "labelled.txt").read_text().splitlines()[:2]
    assert split.sha256 in header
    position = split.labelled[0]
    assert first == f"{position} {labels[position]}" + (f" {known[position]}" if with_names else "")


def test_file_names_that_are_no_line_of_text_come_back(tmp_path):
    odd = ["a\nb.png", "a\r", "\udcff.png", "a\u2028b ", " ä b\u202f.png", "'quoted'"]
    split = complete_split(np.array([0, 1, 0, 1, 0, 1]), 2, np.array([0, 1, 4]))
    save_split(split, tmp_path, odd)
    assert load_split(tmp_path, split.labels, 2, odd).sha256 == split.sha256
    with pytest.raises(ValueError, match="line 2: image 0 is .*, in the data set 'a.b.png'"):
        load_split(tmp_path, split.labels, 2, ["a.b.png", *odd[1:]])


def test_saved_labels_fill_in_what_the_data_set_does_not_know(tmp_path):
    split = complete_split(np.array([1, 0, -1, -1]), 2, np.array([0, 1]))
    save_split(split, tmp_path)
    loaded = load_split(tmp_path, np.full(4, -1), 2)
    assert loaded.labels.tolist() == [1, 0, -1, -1]


def test_fingerprint_covers_positions_labels_and_unlabelled():
    base = LabelSplit(np.array([0, 1, 0, 1]), np.array([0, 1]), np.array([2, 3]), 2)
    others = [
        LabelSplit(np.array([1, 1, 0, 1]), np.array([0, 1]), np.array([2, 3]), 2),
        LabelSplit(np.array([0, 1, 0, 1]), np.array([0, 3]), np.array([1, 2]), 2),
        LabelSplit(np.array([0, 1, 0, 1]), np.array([0, 1]), np.array([2]), 2),
        LabelSplit(np.array([0, 1, 0, 1]), np.array([0, 1]), np.array([2, 3]), 3),
    ]
    assert len({split.sha256 for split in [base, *others]}) == 5
    assert len(base.sha256) == len(hashlib.sha256().hexdigest())


def _edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "labelled.txt").unlink(), "labelled.txt does not exist"),
        (lambda d: (d / "unlabelled.txt").write_text(""), "unlabelled.txt is not a saved unlabelled split"),
        (lambda d: (d / "labelled.txt").write_text("0 0\n"), "labelled.txt is not a saved labelled split"),
        (lambda d: (d / "labelled.txt").write_text((d / "unlabelled.txt").read_text()), "not a saved labelled split"),
        (
            lambda d: (d / "unlabelled.txt").write_text((d / "unlabelled.txt").read_text()[:300]),
            "unlabelled.txt is dam",
        ),
        (lambda d: _edit(d / "labelled.txt", "\n3 0", "\n3 1"), "labelled.txt, line 5: class 1, the data set says 0"),
        (
            lambda d: _edit(d / "labelled.txt", "\n3 0 class 0/a b_3", "\n9 0 class 0/a b_9"),
            "is damaged: sha256",
        ),
        (lambda d: _edit(d / "labelled.txt", "\n3 0", "\n-3 0"), "line 5: '-3 0 .* does not start with 2 numbers"),
        (lambda d: _edit(d / "labelled.txt", "\n3 0", "\n60 0"), "index 60 is out of range for 60 images"),
        (
            lambda d: _edit(d / "labelled.txt", "a b_3", "a b_4"),
            "line 5: image 3 is 'class 0/a b_4.png', in the data set 'class 0/a b_3.png'",
        ),
    ],
)
def test_damaged_or_foreign_files_are_refused(tmp_path, damage, message):
    labels = np.tile(np.arange(3), 20)
    split = complete_split(labels, 3, np.array([0, 3, 1, 2]))
    save_split(split, tmp_path, names(60))
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_split(tmp_path, labels, 3, names(60))


def test_saved_labels_that_contradict_name_classes(tmp_path):
    labels, names = np.tile(np.arange(3), 4), ["ant", "bee", "cat"]
    save_split(make_split(labels, 3, per_class=1), tmp_path)
    with pytest.raises(ValueError, match=r"labelled.txt, line 2: class '(\w+)', the data set says '(?!\1)\w+'"):
        load_split(tmp_path, np.roll(labels, 1), 3, class_names=names)
    save_split(make_split(labels, 3, per_class=1, validation=[0]), tmp_path)
    lines = (tmp_path / "labelled.txt").read_text().splitlines()
    (tmp_path / "labelled.txt").write_text("\n".join([lines[0], "0 2", *lines[2:]]))
    with pytest.raises(
        ValueError, match=r"validation.txt, line 2: class 'ant', labelled.txt or the data set says 'cat'"
    ):
        load_split(tmp_path, np.full(12, -1), 3, class_names=names)


def test_a_split_of_another_data_set_is_refused(tmp_path):
    save_split(make_split(balanced(20, 3), 3, per_class=4), tmp_path)
    with pytest.raises(ValueError, match="written for 60 images of 3 classes, the data set has 63 of 3"):
        load_split(tmp_path, balanced(21, 3), 3)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    save_split(make_split(balanced(20, 3), 3, per_class=4), tmp_path)
    before = (tmp_path / "labelled.txt").read_text()

    def full(_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_split(make_split(balanced(20, 3), 3, per_class=5), tmp_path)
    assert (tmp_path / "labelled.txt").read_text() == before
    assert sorted(os.listdir(tmp_path)) == ["labelled.txt", "unlabelled.txt"]
