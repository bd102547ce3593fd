import logging
import pickle
import random
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from semivim.data.label_split import LabelSplit, complete_split, make_split
from semivim.data.sources import ImageSource, UnreadableImageError, open_source
from semivim.data.two_views import EndlessOrder, SslLoader, StepBatches, View, Views, _mix_seed, create_eval_loader

GREY = {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.25,)}
RANDAUGMENT = "rand-m9-mstd0.5-inc1"


class Pictures:
    """Images whose grey value is their position; some cannot be read."""

    def __init__(self, size=(20, 16), unreadable=()):
        self.size, self.unreadable = size, unreadable

    def __call__(self, index):
        if index in self.unreadable:
            raise OSError("image file is truncated")
        return Image.new("L", self.size, index)


def plain(**changes):
    """A view that leaves grey values alone."""
    return View((1, 8, 8), (0.0,), (1.0,), no_aug=True, **changes)


PLAIN = Views(plain(), plain(), plain())


def random_views():
    crop = {"scale": (0.6, 1.0), "interpolation": "bilinear", "hflip": 0.5}
    return Views(
        View(**GREY, color_jitter=0.4, **crop),
        View(**GREY, color_jitter=0.4, **crop),
        View(**GREY, auto_augment=RANDAUGMENT, re_prob=0.5, re_mode="pixel", **crop),
    )


def numbered(num_labelled=7, num_unlabelled=30, unreadable=()):
    n = num_labelled + num_unlabelled
    source = ImageSource(Pictures(unreadable=unreadable), np.arange(n) % 2)
    return source, complete_split(source.labels, 2, np.arange(num_labelled))


def digits_batches(**changes):
    source = open_source("embedded/digits")
    split = make_split(source.labels, 10, per_class=4)
    arguments = {"views": random_views(), "batch_size": 8, "unlabelled_batch_size": 12, "seed": 5} | changes
    return StepBatches(source, split, **arguments)


def tensors(batch):
    return [*batch.labelled, *batch.unlabelled, batch.skipped]


def assert_same(first, second):
    for a, b in zip(tensors(first), tensors(second), strict=True):
        assert torch.equal(a, b)


def shown(images):
    """Positions of plainly viewed pictures."""
    return (images[:, 0, 0, 0] * 255).round().int().tolist()


# Views


@pytest.mark.parametrize("channels", [1, 3])
def test_view_equals_timms_transform(channels):
    arguments = {"mean": (0.4,) * channels, "std": (0.3,) * channels}
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    image = image.convert("L") if channels == 1 else image
    for training, options in (
        (True, {"scale": (0.3, 1.0), "hflip": 0.5, "color_jitter": 0.4, "interpolation": "bicubic"}),
        (True, {"auto_augment": RANDAUGMENT, "interpolation": "bilinear"}),
        (False, {"crop_pct": 0.9, "interpolation": "bicubic"}),
    ):
        size = (channels, 24, 24)
        view = View(size, is_training=training, **arguments, **options)
        theirs = create_transform(size, is_training=training, **arguments, **options)
        for seed in range(5):
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
            expected = theirs(image)
            actual = view([image], [seed])[0]
            assert torch.allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_view_converts_every_kind_of_image(channels, mode):
    view = View((channels, 16, 16), (0.5,) * channels, (0.5,) * channels, auto_augment=RANDAUGMENT)
    image = Image.new("L", (20, 20), 200).convert(mode)
    assert view([image], [0]).shape == (1, channels, 16, 16)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_view_takes_the_smallest_images(size):
    image = Image.new("RGB", size, (255, 0, 0))
    for training in (True, False):
        view = View((3, 16, 16), (0.0,) * 3, (1.0,) * 3, is_training=training, color_jitter=None)
        assert torch.equal(view([image], [0]).amax(dim=(0, 2, 3)), torch.tensor([1.0, 0.0, 0.0]))


@pytest.mark.parametrize("policy", ["rand-m10-n3-p1-inc1", "rand-m0-n3-p1", "v0", "original", "3a", "augmix-m5-w4-d2"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_augmentation_policy_runs_at_its_limits(policy, channels):
    view = View((channels, 16, 16), (0.5,) * channels, (0.5,) * channels, auto_augment=policy)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).convert("L" if channels == 1 else "RGB")
    seeds = list(range(300))
    assert view([image] * 300, seeds).isfinite().all()


def test_erasing_changes_a_box_of_some_images_and_depends_on_the_seed_alone():
    image = Image.new("L", (32, 32), 128)
    options = {"no_aug": True, **GREY}
    seeds = list(range(40))
    untouched = View(**options)([image] * 40, seeds)
    erased = View(**options, re_prob=0.5)([image] * 40, seeds)
    changed = (erased != untouched).flatten(1).float().mean(1)
    assert 10 < (changed > 0).sum() < 30
    assert changed.max() < 0.45
    assert torch.equal(View(**options, re_prob=0.5)([image] * 3, seeds[7:10]), erased[7:10])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input_size": (2, 32, 32)}, ValueError, "input_size must have 1 or 3 channels, got 2"),
        ({"mean": (0.5, 0.5, 0.5)}, ValueError, "mean and std must have 1 values, got 3 and 1"),
        ({"colour_jitter": 0.4}, TypeError, "colour_jitter"),
    ],
)
def test_view_arguments_that_cannot_be(changes, error, message):
    with pytest.raises(error, match=message):
        View(**(GREY | changes))


# Order


@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_share_every_epoch_without_overlap(world_size):
    source, split = numbered()
    ranks = [StepBatches(source, split, PLAIN, 4, 5, rank=r, world_size=world_size) for r in range(world_size)]
    labelled, unlabelled = [], []
    for step in range(20):
        for rank in ranks:
            batch = rank[step]
            labelled += shown(batch.labelled.image)
            unlabelled += shown(batch.unlabelled.weak)
            assert shown(batch.unlabelled.strong) == shown(batch.unlabelled.weak)
            assert batch.labelled.label.tolist() == [p % 2 for p in shown(batch.labelled.image)]
            assert batch.unlabelled.label.tolist() == [p % 2 for p in shown(batch.unlabelled.weak)]
    for stream, members in ((labelled, range(7)), (unlabelled, range(7, 37))):
        n = len(members)
        epochs = [stream[i : i + n] for i in range(0, len(stream) - n + 1, n)]
        assert len(epochs) > 2
        assert all(sorted(epoch) == list(members) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs), "an epoch repeats the order of another"


def test_labelled_and_unlabelled_images_come_in_orders_and_views_of_their_own():
    source, split = numbered(num_labelled=30, num_unlabelled=0)
    split = complete_split(source.labels, 2, split.labelled, include_labelled=True)
    batch = StepBatches(source, split, PLAIN, 30, 30)[0]
    assert shown(batch.labelled.image) != shown(batch.unlabelled.weak)
    assert sorted(shown(batch.labelled.image)) == sorted(shown(batch.unlabelled.weak))


def test_each_part_of_a_batch_has_its_own_view():
    source, split = numbered()
    views = Views(*(View((1, 8, 8), (0.0,), (std,), no_aug=True) for std in (1.0, 2.0, 4.0)))
    batch, plain = (StepBatches(source, split, v, 7, 30)[0] for v in (views, PLAIN))
    assert torch.equal(batch.labelled.image, plain.labelled.image)
    assert torch.equal(batch.unlabelled.weak, plain.unlabelled.weak / 2)
    assert torch.equal(batch.unlabelled.strong, plain.unlabelled.weak / 4)


def test_labels_are_those_of_the_split_which_lists_may_have_filled_in():
    source = ImageSource(Pictures(), [-1] * 8)
    split = LabelSplit(np.arange(8) % 3, np.arange(3), np.arange(3, 8), 3)
    batch = StepBatches(source, split, PLAIN, 3, 5)[0]
    assert batch.labelled.label.tolist() == [p % 3 for p in shown(batch.labelled.image)]
    assert batch.unlabelled.label.tolist() == [p % 3 for p in shown(batch.unlabelled.weak)]


def test_seeds_are_mixed_by_splitmix64():
    assert _mix_seed(0) == 0xE220A8397B1DCDAF >> 2  # first output of the generator seeded with 0
    parts = [(a, b, c) for a in range(5) for b in range(5) for c in range(5)]
    assert len({_mix_seed(*part) for part in parts}) == 125


def test_order_depends_on_seed_and_stream():
    positions = np.arange(20)

    def first(seed, stream):
        order = EndlessOrder(positions, seed, stream)
        return [order[place][1] for place in range(20)]

    assert first(1, 0) == first(1, 0)
    order = EndlessOrder(positions, 1, 0)
    seen = [order[place] for place in range(0, 200, 5)]
    assert len(order._cached) <= 2, "every epoch's order is kept for ever"
    assert [order[place] for place in range(0, 200, 5)] == seen
    assert len({tuple(first(seed, stream)) for seed in range(3) for stream in range(2)}) == 6


def test_a_batch_larger_than_the_set_repeats_images_in_other_crops():
    source = open_source("embedded/digits")
    split = complete_split(source.labels, 10, np.arange(3), min_per_class=0)
    batch = StepBatches(source, split, random_views(), 9, 0)[0]
    assert batch.unlabelled is None
    images = batch.labelled.image
    order = EndlessOrder(split.labelled, 42, 0)
    shown_at = [place for place in range(9) if order[place][1] == 0]
    assert len(shown_at) == 3
    assert not torch.equal(images[shown_at[0]], images[shown_at[1]])


# Reproducibility


def test_a_step_is_the_same_however_it_is_reached():
    batches = digits_batches()
    loader = SslLoader(batches)
    reached = list(islice(loader.steps(), 5))
    for step, batch in enumerate(islice(SslLoader(digits_batches(), num_workers=2).steps(), 5)):
        assert_same(batch, reached[step])
    for batch, other in zip(islice(loader.steps(start_step=3), 2), reached[3:], strict=True):
        assert_same(batch, other)
    assert_same(pickle.loads(pickle.dumps(batches))[2], reached[2])


def test_seeds_give_other_batches():
    assert not torch.equal(digits_batches()[0].unlabelled.weak, digits_batches(seed=6)[0].unlabelled.weak)


def test_an_image_gets_a_new_view_every_epoch_and_views_are_independent():
    source = open_source("embedded/digits")
    split = complete_split(source.labels, 10, np.arange(4, 1297), np.arange(4))
    view = random_views().weak
    batches = StepBatches(source, split, Views(view, view, view), 1, 4)
    first, second = batches[0].unlabelled, batches[1].unlabelled
    order = EndlessOrder(split.unlabelled, 42, 1)
    positions = [order[place][1] for place in range(8)]
    assert sorted(positions[:4]) == sorted(positions[4:]) == [0, 1, 2, 3]
    for row, position in enumerate(positions[:4]):
        again = positions[4:].index(position)
        assert not torch.equal(first.weak[row], second.weak[again])
        assert not torch.equal(first.weak[row], first.strong[row])


def test_loading_leaves_the_process_generators_alone():
    batches = digits_batches()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    batches[0]
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


# Unreadable images


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_images_are_skipped_counted_and_named_once(caplog, num_workers):
    source, split = numbered(unreadable=(2, 11))
    source.names, source.root = [f"{i}.png" for i in range(37)], "/data"
    loader = SslLoader(StepBatches(source, split, PLAIN, 7, 30), num_workers=num_workers)
    with caplog.at_level(logging.WARNING):
        for batch in islice(loader.steps(), 3):
            positions = shown(batch.unlabelled.weak)
            assert len(positions) == 30
            assert 11 not in positions
            assert set(positions) == set(range(7, 37)) - {11}
            assert shown(batch.labelled.image).count(2) == 0
            # What stands in for it comes with its own label.
            assert batch.labelled.label.tolist() == [p % 2 for p in shown(batch.labelled.image)]
    assert loader.unreadable.keys() == {2, 11}
    assert loader.unreadable == {2: 3, 11: 3}
    assert sorted(record.getMessage() for record in caplog.records) == [
        "skipped unreadable /data/11.png",
        "skipped unreadable /data/2.png",
    ]


def test_all_images_unreadable_ends_with_an_error():
    source, split = numbered(unreadable=range(7))
    message = r"100 images in a row cannot be read; the last: image \d is unreadable: image file is truncated"
    for num_workers in (0, 1):
        with pytest.raises(UnreadableImageError, match=message):
            next(SslLoader(StepBatches(source, split, PLAIN, 2, 2), num_workers=num_workers).steps())


def test_unreadable_image_in_evaluation_is_an_error():
    source, _ = numbered(unreadable=(9,))
    with pytest.raises(UnreadableImageError, match="image 9 is unreadable: image file is truncated"):
        list(create_eval_loader(source, plain(is_training=False), 4))


# Loaders


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_shows_every_image_once_over_all_ranks(world_size):
    source, _ = numbered()
    seen = []
    for rank in range(world_size):
        loader = create_eval_loader(source, plain(is_training=False), 5, rank=rank, world_size=world_size)
        for batch in loader:
            assert batch.label.tolist() == [p % 2 for p in shown(batch.image)]
            seen += shown(batch.image)
    assert sorted(seen) == list(range(37))


def test_evaluation_in_workers_equals_evaluation_here():
    source = open_source("embedded/digits", split="validation")
    view = View(**GREY, is_training=False, crop_pct=1.0, interpolation="bilinear")
    here, there = (list(create_eval_loader(source, view, 128, num_workers=n)) for n in (0, 2))
    assert [len(batch.label) for batch in here] == [128, 128, 128, 116]
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.label, b.label)


def test_evaluation_needs_labels():
    source = ImageSource(Pictures(), [0, -1, 1])
    with pytest.raises(ValueError, match="1 evaluation images have no label, the first is image 1"):
        create_eval_loader(source, plain(is_training=False), 2)


def test_unlabelled_images_are_needed_only_where_they_are_asked_for():
    source, split = numbered(num_unlabelled=0)
    batch = StepBatches(source, split, PLAIN, 7, 0)[0]
    assert batch.unlabelled is None
    assert sorted(shown(batch.labelled.image)) == list(range(7))
    with pytest.raises(ValueError, match="all 7 are labelled; label fewer, .*--unlabeled-dir.*--ssl-method supervised"):
        StepBatches(source, split, PLAIN, 7, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1 and unlabelled_batch_size at least 0, got 0 and 12"),
        ({"unlabelled_batch_size": -1}, "got 8 and -1"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, world_size=2\), got 2"),
    ],
)
def test_batch_arguments_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        digits_batches(**changes)


def test_split_of_another_source_is_refused():
    source, _ = numbered()
    _, split = numbered(num_unlabelled=31)
    with pytest.raises(ValueError, match="split covers 38 images, the source has 37"):
        StepBatches(source, split, PLAIN, 2, 2)
