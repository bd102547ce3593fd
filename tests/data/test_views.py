import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from semivim.data.views import View
from tests.data.pictures import GREY, RANDAUGMENT


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
