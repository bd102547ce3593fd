import logging
import pickle
import random
from itertools import islice

import numpy as np
import pytest
import torch

from semivim.data.label_split import LabelSplit, complete_split, make_split
from semivim.data.sources import ImageSource, UnreadableImageError, open_source
from semivim.data.streams import EndlessOrder, SslLoader, StepBatches, Views, _mix_seed
from semivim.data.views import View
from tests.data.pictures import GREY, RANDAUGMENT, Pictures, numbered, plain, shown

PLAIN = Views(plain(), plain(), plain())


def random_views():
    crop = {"scale": (0.6, 1.0), "interpolation": "bilinear", "hflip": 0.5}
    return Views(
        View(**GREY, color_jitter=0.4, **crop),
        View(**GREY, color_jitter=0.4, **crop),
        View(**GREY, auto_augment=RANDAUGMENT, re_prob=0.5, re_mode="pixel", **crop),
    )


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
