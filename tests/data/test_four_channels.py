"""Augmentation of images with alpha: colours change as without it, and all four channels move alike."""

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP, AugmentOp, RandAugment
from timm.data.transforms import MaybePILToTensor
from torchvision.transforms import Compose

from semivim.data.four_channels import augment_operations, keep_alpha_apart
from semivim.data.views import View

MEAN = (0.4, 0.5, 0.6, 77 / 255)  # what moves in from outside has this colour, and an alpha of 77
MOVING = {"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel"}
SEEDS = list(range(60))


def noise(alpha=None):
    """Colours and alpha at random, or one alpha everywhere."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 4), dtype=np.uint8)
    if alpha is not None:
        pixels[..., 3] = alpha
    return Image.fromarray(pixels)


def drawn(image, channels, **options):
    """60 views of the image, which a worker process would draw."""
    view = View((channels, 24, 24), MEAN[:channels], (0.25,) * channels, **options)
    return pickle.loads(pickle.dumps(view))([image] * len(SEEDS), SEEDS)


def operate(name, image, fill):
    """An operation of timm on a picture, from one seed."""
    hparams = {"img_mean": fill, "translate_const": 9, "interpolation": Image.Resampling.BICUBIC}
    transform = Compose([RandAugment([AugmentOp(name, 1.0, 7, hparams)], 1), MaybePILToTensor()])
    if image.mode == "RGBA":
        keep_alpha_apart(transform)
    random.seed(1)
    return transform(image)


@pytest.mark.parametrize("name", sorted(set(NAME_TO_OP) - MOVING))
def test_operations_on_colour_leave_alpha_as_it_is(name):
    image = noise()
    after = operate(name, image, (1, 2, 3, 4))
    assert torch.equal(after[3], torch.from_numpy(np.array(image))[..., 3])
    assert torch.equal(after[:3], operate(name, image.convert("RGB"), (1, 2, 3)))


@pytest.mark.parametrize("name", sorted(MOVING))
def test_operations_that_move_pixels_treat_all_channels_alike(name):
    image, fill = noise(), (1, 200, 3, 40)
    alone = [operate(name, channel, (value,)) for channel, value in zip(image.split(), fill, strict=True)]
    after = operate(name, image, fill)
    assert torch.equal(after, torch.cat(alone))
    assert not torch.equal(after, torch.from_numpy(np.array(image)).permute(2, 0, 1))


@pytest.mark.parametrize(
    "options",
    [
        {"color_jitter": (0.8, 0.8, 0.8, 0.4)},
        {"color_jitter": 0.8, "color_jitter_prob": 0.5, "grayscale_prob": 0.5, "gaussian_blur_prob": 0.5},
        {"auto_augment": "rand-m9-n10", "vflip": 0.5},
        {"auto_augment": "original-mstd0.5"},
        {"auto_augment": "3a"},
        {"auto_augment": "augmix-m5-w4-d2"},
        {"train_crop_mode": "rkrc"},
        {"train_crop_mode": "rkrr"},
        {"no_aug": True},
        {"is_training": False, "crop_pct": 0.9},
        {"is_training": False, "crop_pct": 0.9, "crop_mode": "border"},
        {"re_prob": 0.5},
    ],
)
def test_colours_are_those_of_an_image_without_alpha(options):
    image = noise()
    image.paste((200, 100, 50, 0), (5, 5, 30, 20))
    four, three = drawn(image, 4, **options), drawn(image.convert("RGB"), 3, **options)
    assert torch.equal(four.pixels[:, :3], three.pixels)
    assert torch.equal(four.boxes, three.boxes)
    assert len(four.fill) * 3 == len(three.fill) * 4


@pytest.mark.parametrize(
    "options", [{"auto_augment": "rand-m9-n10"}, {"auto_augment": "v0"}, {"color_jitter": 0.8, "grayscale_prob": 0.5}]
)
def test_one_alpha_everywhere_stays_the_same(options):
    pixels = drawn(noise(alpha=77), 4, **options).pixels
    assert (pixels[:, 3] == 77).all()
    assert len(pixels.flatten(1).unique(dim=0)) > 50


def test_an_image_without_alpha_is_opaque():
    for mode in ("L", "RGB"):
        assert (drawn(noise().convert(mode), 4, color_jitter=0.4).pixels[:, 3] == 255).all()


def test_operations_of_every_policy_are_found():
    for policy, least in (("rand-m9", 15), ("v0", 40), ("3a", 3), ("augmix-m3", 13)):
        view = View((3, 24, 24), MEAN[:3], (0.25,) * 3, auto_augment=policy)
        found = [operation for step in view.transform.transforms for operation in augment_operations(step)]
        assert len(found) >= least
        assert all(isinstance(operation, AugmentOp) for operation in found)
