"""Training on images with alpha, and the labels that a saved model gives them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import train_arm
import train_ssl
from semivim.cli import main
from semivim.inference import load_model, predict
from tests.training import refused

CLASSES = ("clear", "opaque")
TINY = ["--in-chans", "4", "--img-size", "32", "--workers", "0", "--warmup-epochs", "0"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Pictures alike but for their alpha."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split in ("train", "validation"):
        for name, alpha in zip(CLASSES, (20, 230), strict=True):
            (folder / split / name).mkdir(parents=True)
            for position in range(6):
                pixels = rng.integers(0, 256, (36, 40, 4), dtype=np.uint8)
                pixels[..., 3] = alpha
                Image.fromarray(pixels).save(folder / split / name / f"{position}.png")
    return folder


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs")
    flags = ["--data-dir", images, "--model", "test_vim", "--labels-per-class", 3, "-b", 2, "--unlabeled-ratio", 1]
    flags += ["--epochs", 1, "--train-batches-per-epoch", 3, "--strong-aa", "rand-m9-n3", "--output", output]
    return output / "run", train_ssl.main([*map(str, flags), *TINY, "--experiment", "run"])


def test_a_saved_model_sees_images_as_in_training(images, trained, capsys, monkeypatch):
    folder, results = trained
    config = json.loads((folder / "config.json").read_text())
    assert config["semivim_pixel_rules"] == {"alpha_background": None, "max_value": None}
    assert config["pretrained_cfg"]["input_size"] == [4, 32, 32]
    assert (config["pretrained_cfg"]["mean"][3], config["pretrained_cfg"]["std"][3]) == (0.5, 0.5)

    model, seen = load_model(str(folder)), []
    monkeypatch.setattr(model, "forward", lambda image, forward=model.forward: seen.append(image) or forward(image))
    right = 0
    for name, alpha in zip(CLASSES, (20, 230), strict=True):
        for path in sorted((images / "validation" / name).iterdir()):
            right += predict(model, path)[0][0] == name
            torch.testing.assert_close(seen[-1][:, 3], torch.full((1, 32, 32), (alpha / 255 - 0.5) / 0.5))
    assert 100 * right / 12 == pytest.approx(results["best"]["top1"])

    image = str(images / "validation" / "clear" / "0.png")
    main(["predict", image, "--model", str(folder)])
    labels = {line.split()[-1] for line in capsys.readouterr().out.splitlines()}
    assert labels == set(CLASSES)
    with refused("--alpha-background: got black, but alpha is kept as the fourth channel", capsys):
        main(["predict", image, "--model", str(folder), "--alpha-background", "black"])


def test_a_background_and_a_model_of_four_channels_need_its_flag(images, trained, tmp_path, capsys):
    flags = ["--data-dir", str(images), "--labels-per-class", "3", "--output", str(tmp_path)]
    with refused("--alpha-background: got white, but alpha is kept as the fourth channel", capsys):
        train_ssl.main([*flags, *TINY, "--alpha-background", "white"])
    with refused("it takes images of 4 channels, wanted --in-chans 4 too", capsys):
        train_ssl.main([*flags, "--model", f"local-dir:{trained[0]}"])


def test_pretraining_takes_four_channels(images, tmp_path):
    flags = ["--unlabeled-dir", images / "train", "--model", "test_vim", "--model-kwargs", "patch_size=8"]
    flags += ["--cluster", 2, "--dec-dim", 16, "--dec-depth", 1, "-b", 4, "--epochs", 1, "--output", tmp_path]
    train_arm.main([*map(str, flags), *TINY, "--train-batches-per-epoch", "2", "--experiment", "run"])
    backbone = load_model(str(tmp_path / "run"))
    assert backbone.patch_embed.proj.weight.shape[1] == 4
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["semivim_pixel_rules"]["alpha_background"] is None
