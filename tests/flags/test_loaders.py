import itertools

import pytest
import torch
from PIL import Image

import train_ssl
from semivim.flags.loaders import create_loaders
from semivim.utils.user_error import UserError

CONFIG = {
    "input_size": (1, 16, 16), "mean": (0.5,), "std": (0.5,), "interpolation": "bicubic", "crop_pct": 1.0,
    "crop_mode": "center",
}  # fmt: skip


def create(words, num_unlabelled):
    args = train_ssl.parse_args(["-j", "0", "-b", "4", "-vb", "250", *words.split()])
    args.rank, args.world_size = 0, 1
    data = train_ssl.open_data(args, None)
    return data, create_loaders(args, *data, CONFIG, num_unlabelled, torch.device("cpu"))


def test_batches_hold_labelled_and_unlabelled_images():
    (source, _, split), (loader, evaluation, sample) = create("", num_unlabelled=8)
    labelled, unlabelled = next(loader.steps())
    assert [view.shape for view in labelled.views] == [(4, 1, 16, 16)]
    assert [view.shape for view in unlabelled.views] == [(8, 1, 16, 16)] * 2
    assert sum(len(batch.label) for batch in evaluation) == 500
    first, again = torch.cat(list(sample())), torch.cat(list(sample()))
    assert len(first) == len(split.unlabelled) // 250 * 250 + 250
    assert torch.equal(first, again)


def test_without_unlabelled_images_there_is_one_stream():
    _, (loader, _, _) = create("--ssl-method supervised", num_unlabelled=0)
    assert len(next(loader.steps())) == 1


def test_lack_of_unlabelled_images_is_an_error_where_they_are_needed():
    create("--label-fraction 1 --ssl-method supervised", num_unlabelled=0)
    for words, number in (("--label-fraction 1", 8), ("--label-fraction 1 --posthoc-debias unlabeled", 0)):
        with pytest.raises(UserError, match="no unlabelled image is left"):
            create(words, num_unlabelled=number)


def test_huge_originals_are_shrunk_while_they_are_decoded_for_training(tmp_path):
    for split, name in itertools.product(("train", "validation"), ("cat", "dog")):
        (tmp_path / split / name).mkdir(parents=True)
        for i in range(3):
            colour = (9 * i, 99, 199 if split == "train" else 9)
            Image.new("RGB", (1600, 1200), colour).save(tmp_path / split / name / f"{i}.jpg")
    words = f"--data-dir {tmp_path} --labels-per-class 1 --scale 0.5 1 -b 1"
    (source, val_source, _), _ = create(words, num_unlabelled=1)
    assert source.image(0).size == (200, 150)
    assert val_source.image(0).size == (1600, 1200)
