import logging
import pickle
import random
from itertools import islice

import numpy as np
import pytest
import torch

from semivim.data.label_split import complete_split, make_split
from semivim.data.sources import ImageSource, UnreadableImageError, open_source
from semivim.data.streams import EndlessOrder, ImageStream, StreamLoader, _mix_seed
from semivim.data.views import View
from tests.data.pictures import GREY, RANDAUGMENT, Pictures, numbered, plain, shown

CROP = {"scale": (0.6, 1.0), "interpolation": "bilinear", "hflip": 0.5}


def weak_view():
    return View(**GREY, color_jitter=0.4, **CROP)


def strong_view():
    return View(**GREY, auto_augment=RANDAUGMENT, re_prob=0.5, re_mode="pixel", **CROP)


PLAIN = (plain(),), (plain(), plain())


def two_streams(source, split, sizes=(7, 30), views=PLAIN, **options):
    """Labelled images in one view, unlabelled ones in two."""
    options = {"labels": split.labels} | options
    return [
        ImageStream(source, positions, part, size, stream=i, **options)
        for i, (positions, part, size) in enumerate(zip((split.labelled, split.unlabelled), views, sizes, strict=True))
    ]


def digit_streams(**options):
    source = open_source("embedded/digits")
    split = make_split(source.labels, 10, per_class=4)
    views = ((weak_view(),), (weak_view(), strong_view()))
    return two_streams(source, split, sizes=(8, 12), views=views, **({"seed": 5} | options))


def tensors(batches):
    return [tensor for batch in batches for tensor in (*batch.views, batch.label)]


def assert_same(first, second):
    for a, b in zip(tensors(first), tensors(second), strict=True):
        assert torch.equal(a, b)


def take(streams, step, **options):
    return next(StreamLoader(streams, **options).steps(step))


# Order


@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_share_every_epoch_without_overlap(world_size):
    source, split = numbered()
    ranks = [
        StreamLoader(two_streams(source, split, sizes=(4, 5), rank=rank, world_size=world_size)).steps()
        for rank in range(world_size)
    ]
    seen_labelled, seen_unlabelled = [], []
    for _ in range(20):
        for steps in ranks:
            labelled, unlabelled = next(steps)
            weak, strong = map(shown, unlabelled.views)
            assert weak == strong
            assert labelled.label.tolist() == [p % 2 for p in shown(labelled.views[0])]
            assert unlabelled.label.tolist() == [p % 2 for p in weak]
            seen_labelled += shown(labelled.views[0])
            seen_unlabelled += weak
    for seen, members in ((seen_labelled, range(7)), (seen_unlabelled, range(7, 37))):
        n = len(members)
        epochs = [seen[i : i + n] for i in range(0, len(seen) - n + 1, n)]
        assert len(epochs) > 2
        assert all(sorted(epoch) == list(members) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs), "an epoch repeats the order of another"


def test_streams_of_the_same_images_have_orders_of_their_own():
    source, split = numbered(num_labelled=30, num_unlabelled=0)
    split = complete_split(source.labels, 2, split.labelled, include_labelled=True)
    labelled, unlabelled = take(two_streams(source, split, sizes=(30, 30)), 0)
    assert shown(labelled.views[0]) != shown(unlabelled.views[0])
    assert sorted(shown(labelled.views[0])) == sorted(shown(unlabelled.views[0]))


def test_each_view_is_its_own():
    source, split = numbered()
    one, two, four = (View((1, 8, 8), (0.0,), (std,), no_aug=True) for std in (1.0, 2.0, 4.0))
    labelled, unlabelled = take(two_streams(source, split, views=((one,), (two, four))), 0)
    alike, reference = take(two_streams(source, split), 0)
    assert torch.equal(labelled.views[0], alike.views[0])
    assert torch.equal(unlabelled.views[0], reference.views[0] / 2)
    assert torch.equal(unlabelled.views[1], reference.views[0] / 4)


def test_labels_are_those_given_which_lists_may_have_filled_in():
    source = ImageSource(Pictures(), [-1] * 8)
    (batch,) = take([ImageStream(source, np.arange(8), [plain()], 8, labels=np.arange(8) % 3)], 0)
    assert batch.label.tolist() == [p % 3 for p in shown(batch.views[0])]


def test_a_stream_needs_no_labels():
    source, split = numbered()
    options = {"seed": 3, "stream": 1}
    (batch,) = take([ImageStream(source, split.unlabelled, [plain()], 30, **options)], 0)
    assert batch.label is None
    assert sorted(shown(batch.views[0])) == list(range(7, 37))
    (labelled,) = take([ImageStream(source, split.unlabelled, [plain()], 30, labels=split.labels, **options)], 0)
    assert torch.equal(batch.views[0], labelled.views[0])


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
    stream = ImageStream(source, np.arange(3), [weak_view()], 9)
    ((images,), _) = take([stream], 0)[0]
    shown_at = [place for place in range(9) if stream.order[place][1] == 0]
    assert len(shown_at) == 3
    assert not torch.equal(images[shown_at[0]], images[shown_at[1]])


# Reproducibility


def test_a_step_is_the_same_however_it_is_reached():
    reached = list(islice(StreamLoader(digit_streams()).steps(), 5))
    for num_workers in (1, 2):
        loader = StreamLoader(digit_streams(), num_workers=num_workers)
        for step, batches in enumerate(islice(loader.steps(), 5)):
            assert_same(batches, reached[step])
    for batches, other in zip(islice(StreamLoader(digit_streams()).steps(start_step=3), 2), reached[3:], strict=True):
        assert_same(batches, other)
    assert_same(take(pickle.loads(pickle.dumps(digit_streams())), 2), reached[2])


def test_an_image_looks_the_same_in_any_batch():
    """Two ranks of 4 images give what one of 8 gives, erased boxes and their noise included."""
    source = open_source("embedded/digits")

    def images(size, **ranks):
        stream = ImageStream(source, np.arange(40), [strong_view()], size, seed=1, **ranks)
        return take([stream], 2)[0].views[0]

    halves = [images(4, rank=rank, world_size=2) for rank in range(2)]
    assert torch.equal(torch.cat(halves), images(8))


def test_no_two_draws_share_a_seed():
    class Noted:
        def __call__(self, images, seeds):
            self.seeds = [seed + erasing for seed in seeds for erasing in (0, 1)]

    views = [Noted(), Noted(), Noted()]
    stream = ImageStream(numbered()[0], np.arange(37), views, 37)
    stream[0]
    seeds = [seed for view in views for seed in view.seeds]
    assert len(set(seeds)) == len(seeds) == 3 * 2 * 37


def test_seeds_give_other_batches():
    (_, first), (_, second) = take(digit_streams(), 0), take(digit_streams(seed=6), 0)
    assert not torch.equal(first.views[0], second.views[0])


def test_an_image_gets_a_new_view_every_epoch_and_views_are_independent():
    source = open_source("embedded/digits")
    stream = ImageStream(source, np.arange(4), [weak_view(), weak_view()], 4)
    first, second = (batches[0] for batches in islice(StreamLoader([stream]).steps(), 2))
    positions = [stream.order[place][1] for place in range(8)]
    assert sorted(positions[:4]) == sorted(positions[4:]) == [0, 1, 2, 3]
    for row, position in enumerate(positions[:4]):
        again = positions[4:].index(position)
        assert not torch.equal(first.views[0][row], second.views[0][again])
        assert not torch.equal(first.views[0][row], first.views[1][row])


def test_loading_leaves_the_process_generators_alone():
    streams = digit_streams()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    for stream in streams:
        stream.load(stream[0], torch.device("cpu"))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_gpu_is_given_the_same_bits(num_workers):
    reached = list(islice(StreamLoader(digit_streams()).steps(), 5))
    loader = StreamLoader(digit_streams(), "cuda", num_workers, pin_memory=True)
    for batches, others in zip(islice(loader.steps(), 5), reached, strict=True):
        assert all(tensor.is_cuda for tensor in tensors(batches))
        assert all(torch.equal(a.cpu(), b) for a, b in zip(tensors(batches), tensors(others), strict=True))


# From worker to device


def test_pixels_leave_a_worker_with_eight_bits():
    loader = StreamLoader(digit_streams(), num_workers=1)
    drawn = []
    loader._move, move = lambda batches: drawn.append(batches) or move(batches), loader._move
    labelled, unlabelled = next(loader.steps())
    views = [view for part in drawn[0] for view in part.views]
    assert [view.pixels.dtype for view in views] == [torch.uint8] * 3
    assert sum(view.pixels.nbytes for view in views) == (8 + 2 * 12) * 32 * 32
    assert all(view.dtype == torch.float32 for view in (*labelled.views, *unlabelled.views))


def test_unreadable_images_are_counted_with_the_batch_that_is_used(monkeypatch):
    """A GPU's next batch is loaded ahead; a run that is resumed before using it loads and counts it again."""

    def one_ahead(batches, move, device):
        ahead = None
        for batch in batches:
            if ahead is not None:
                yield move(ahead)
            ahead = batch

    monkeypatch.setattr("semivim.data.streams.prefetch", one_ahead)
    source, split = numbered(unreadable=(2,))
    loader = StreamLoader(two_streams(source, split))
    next(loader.steps())
    assert loader.unreadable == {2: 1}


# Unreadable images


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_images_are_skipped_counted_and_named_once(caplog, num_workers):
    source, split = numbered(unreadable=(2, 11))
    source.names, source.root = [f"{i}.png" for i in range(37)], "/data"
    loader = StreamLoader(two_streams(source, split), num_workers=num_workers)
    with caplog.at_level(logging.WARNING):
        for labelled, unlabelled in islice(loader.steps(), 3):
            positions = shown(unlabelled.views[0])
            assert len(positions) == 30
            assert set(positions) == set(range(7, 37)) - {11}
            assert shown(labelled.views[0]).count(2) == 0
            # What stands in for it comes with its own label.
            assert labelled.label.tolist() == [p % 2 for p in shown(labelled.views[0])]
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
            take(two_streams(source, split, sizes=(2, 2)), 0, num_workers=num_workers)


# Arguments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"positions": np.arange(0)}, "positions must name at least one image, got none"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, world_size=2\), got 2"),
        ({"labels": np.arange(38)}, "there are labels for 38 images, the source has 37"),
    ],
)
def test_stream_arguments_that_cannot_be(changes, message):
    source, split = numbered()
    arguments = {"positions": split.labelled, "views": [plain()], "batch_size": 2, "labels": split.labels}
    with pytest.raises(ValueError, match=message):
        ImageStream(source, **(arguments | changes))


def test_streams_of_several_sources_are_refused():
    streams = [ImageStream(numbered()[0], np.arange(7), [plain()], 2) for _ in range(2)]
    with pytest.raises(ValueError, match="streams must share one source"):
        StreamLoader(streams)
