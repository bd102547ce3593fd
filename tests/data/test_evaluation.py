import pytest
import torch

from semivim.data.evaluation import EvaluationLoader
from semivim.data.sources import ImageSource, UnreadableImageError, open_source
from semivim.data.views import View
from semivim.utils.user_error import UserError
from tests.data.pictures import GREY, Pictures, numbered, plain, shown


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_shows_every_image_once_over_all_ranks(world_size):
    source, _ = numbered()
    seen = []
    for rank in range(world_size):
        loader = EvaluationLoader(source, plain(is_training=False), 5, rank=rank, world_size=world_size)
        batches = list(loader)
        assert len(batches) == len(loader)
        for batch in batches:
            assert batch.label.tolist() == [p % 2 for p in shown(batch.image)]
            seen += shown(batch.image)
        assert shown(next(iter(loader)).image) == shown(batches[0].image), "a second pass differs"
    assert sorted(seen) == list(range(37))


def test_evaluation_in_workers_equals_evaluation_here():
    source = open_source("embedded/digits", split="validation")
    view = View(**GREY, is_training=False, crop_pct=1.0, interpolation="bilinear")
    here, there = (list(EvaluationLoader(source, view, 128, num_workers=n)) for n in (0, 2))
    assert [len(batch.label) for batch in here] == [128, 128, 128, 116]
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.label, b.label)


def test_pixels_leave_a_worker_with_eight_bits():
    source = open_source("embedded/digits", split="validation")
    view = View(**GREY, is_training=False)
    loader = EvaluationLoader(source, view, 4, num_workers=1)
    pixels, label = next(iter(loader.loader))
    assert pixels.pixels.dtype == torch.uint8
    assert pixels.pixels.nbytes == 4 * 32 * 32
    batch = next(iter(loader))
    assert batch.image.dtype == torch.float32
    torch.testing.assert_close(batch.image, (pixels.pixels / 255 - 0.5) / 0.25)
    assert torch.equal(batch.label, label)


def test_evaluation_needs_labels():
    source = ImageSource(Pictures(), [0, -1, 1])
    with pytest.raises(UserError, match="1 evaluation images have no label, the first is image 1"):
        EvaluationLoader(source, plain(is_training=False), 2)


def test_unreadable_image_in_evaluation_is_an_error():
    source, _ = numbered(unreadable=(9,))
    with pytest.raises(UnreadableImageError, match="image 9 is unreadable: image file is truncated"):
        list(EvaluationLoader(source, plain(is_training=False), 4))
