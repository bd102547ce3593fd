import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing

from semivim.data.views import View, erase, normalise
from tests.data.pictures import GREY, RANDAUGMENT

CPU = torch.device("cpu")


def look(view, images, seeds):
    """What a model would be given."""
    return view.load(view(images, seeds), CPU)


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


def noise(size=(40, 30), mode="RGB"):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).convert(mode)


@pytest.mark.parametrize("channels", [1, 3])
def test_view_equals_timms_transform(channels):
    arguments = {"mean": (0.4,) * channels, "std": (0.3,) * channels}
    image = noise(mode="L" if channels == 1 else "RGB")
    for training, options in (
        (True, {"scale": (0.3, 1.0), "hflip": 0.5, "color_jitter": 0.4, "interpolation": "bicubic"}),
        (True, {"auto_augment": RANDAUGMENT, "interpolation": "bilinear"}),
        (False, {"crop_pct": 0.9, "interpolation": "bicubic"}),
    ):
        size = (channels, 24, 24)
        view = View(size, is_training=training, **arguments, **options)
        theirs = create_transform(size, is_training=training, **arguments, **options)
        for seed in range(5):
            seed_all(seed)
            expected = theirs(image)
            actual = look(view, [image], [seed])[0]
            assert torch.allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_view_converts_every_kind_of_image(channels, mode):
    view = View((channels, 16, 16), (0.5,) * channels, (0.5,) * channels, auto_augment=RANDAUGMENT)
    image = Image.new("L", (20, 20), 200).convert(mode)
    assert look(view, [image], [0]).shape == (1, channels, 16, 16)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_view_takes_the_smallest_images(size):
    image = Image.new("RGB", size, (255, 0, 0))
    for training in (True, False):
        view = View((3, 16, 16), (0.0,) * 3, (1.0,) * 3, is_training=training, color_jitter=None)
        assert torch.equal(look(view, [image], [0]).amax(dim=(0, 2, 3)), torch.tensor([1.0, 0.0, 0.0]))


@pytest.mark.parametrize(
    "policy", ["rand-m10-n3-p1-inc1", "rand-m0-n3-p1", "v0", "original", "3a", "augmix-m10-w4-d2-mstd0"]
)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_augmentation_policy_runs_at_its_limits(policy, channels):
    view = View((channels, 16, 16), (0.5,) * channels, (0.5,) * channels, auto_augment=policy)
    image = noise((16, 16), {1: "L", 3: "RGB", 4: "RGBA"}[channels])
    assert look(view, [image] * 300, list(range(300))).isfinite().all()


def test_pixels_have_eight_bits_until_they_are_on_the_device():
    view = View((3, 24, 24), (0.5,) * 3, (0.5,) * 3, re_prob=0.5)
    drawn = view([noise()] * 8, list(range(8)))
    assert drawn.pixels.dtype == torch.uint8
    assert drawn.pixels.shape == (8, 3, 24, 24)
    assert drawn.pixels.float().std() > 1, "pixels in [0, 255], not in [0, 1]"
    assert 0 < len(drawn.boxes) < 8
    assert len(drawn.fill) == 3 * (drawn.boxes[:, 3] * drawn.boxes[:, 4]).sum(), "values of erased pixels only"


def test_normalised_pixels_are_those_of_floats_divided_by_255():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    before = pixels.clone()
    mean, std = torch.tensor([[[0.4]]]), torch.tensor([[[0.3]]])
    images = normalise(pixels, mean * 255, std * 255)
    assert torch.equal(images, (pixels.float() - mean * 255) / (std * 255))
    expected = (pixels.double() / 255 - mean.double()) / std.double()
    torch.testing.assert_close(images.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(pixels, before)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_erasing_is_that_of_timm_on_normalised_images(mode, count):
    options = {"input_size": (3, 24, 20), "mean": (0.4, 0.5, 0.6), "std": (0.3, 0.2, 0.1), "no_aug": True}
    images, seeds = [noise()] * 30, list(range(100, 130))
    expected = look(View(**options), images, seeds)
    untouched = expected.clone()
    erasing = RandomErasing(0.6, mode=mode, max_count=count, device="cpu")
    for row, seed in zip(expected, seeds, strict=True):
        seed_all(seed + 1)
        erasing(row)
    assert not torch.equal(expected, untouched)
    erased = look(View(**options, re_prob=0.6, re_mode=mode, re_count=count), images, seeds)
    assert torch.equal(erased, expected)


def test_boxes_are_filled_one_after_another():
    images = torch.zeros(2, 1, 4, 4)
    boxes = torch.tensor([[0, 0, 0, 2, 2], [0, 1, 1, 2, 2], [1, 3, 0, 1, 4]])
    expected = torch.zeros(2, 1, 4, 4)
    expected[0, 0, :2, :2], expected[0, 0, 1:3, 1:3], expected[1, 0, 3] = 1.0, 2.0, 3.0
    for per_pixel, repeats in ((False, 1), (True, 4)):
        fill = torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(repeats)
        assert torch.equal(erase(images.clone(), boxes, fill, per_pixel), expected)


def test_erasing_changes_a_box_of_some_images_and_depends_on_the_seed_alone():
    image = Image.new("L", (32, 32), 128)
    options = {"no_aug": True, **GREY}
    seeds = list(range(40))
    untouched = look(View(**options), [image] * 40, seeds)
    erased = look(View(**options, re_prob=0.5), [image] * 40, seeds)
    changed = (erased != untouched).flatten(1).float().mean(1)
    assert 10 < (changed > 0).sum() < 30
    assert changed.max() < 0.45
    assert torch.equal(look(View(**options, re_prob=0.5), [image] * 3, seeds[7:10]), erased[7:10])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_a_gpu_gives_the_same_bits(mode):
    view = View((3, 64, 48), (0.4, 0.5, 0.6), (0.3, 0.2, 0.1), re_prob=0.7, re_mode=mode, re_count=3)
    drawn = view([noise((80, 70))] * 16, list(range(16)))
    images = view.load(drawn, torch.device("cuda"))
    assert images.is_cuda
    assert torch.equal(images.cpu(), view.load(drawn, CPU))


def test_drawing_leaves_the_process_generators_alone():
    view = View(**GREY, auto_augment=RANDAUGMENT, re_prob=1.0)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    look(view, [noise()], [3])
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input_size": (2, 32, 32)}, ValueError, "input_size must have 1, 3 or 4 channels, got 2"),
        ({"mean": (0.5, 0.5, 0.5)}, ValueError, "mean and std must have 1 values, got 3 and 1"),
        ({"colour_jitter": 0.4}, TypeError, "colour_jitter"),
    ],
)
def test_view_arguments_that_cannot_be(changes, error, message):
    with pytest.raises(error, match=message):
        View(**(GREY | changes))
