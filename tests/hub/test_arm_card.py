import json

import pytest
import timm
import yaml
from PIL import Image
from timm.models import save_for_hf

import semivim  # noqa: F401
from semivim.hub.arm_card import is_pretraining
from semivim.hub.hub import publish
from semivim.hub.model_card import model_card, read_run
from semivim.hub.model_folder import load_folder
from semivim.utils.user_error import UserError

METRICS = {
    "pretraining": {"directions": "forward", "images": 1200, "loss": 0.6123, "loss_of_zero": 0.9948},
    "best": {"epoch": 3, "loss": 0.6012, "loss_of_zero": 0.9948},
    "unreadable_images": {"/home/someone/heap/7.png": 2},
}


@pytest.fixture
def folder(tmp_path):
    """A run folder as train_arm.py leaves it, without the training."""
    save_for_hf(timm.create_model("test_vim", num_classes=0), tmp_path, safe_serialization=True)
    args = {
        "model": "test_vim",
        "unlabeled_dir": "/home/someone/heap",
        "dataset": "",
        "directions": "forward",
        "cluster": 2,
        "opt": "a`d | <b>",
    }
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(args | {"output": "/home/someone/runs"}))
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    (tmp_path / "summary.csv").write_text("epoch,train_loss\n0,1.2\n")
    Image.new("RGB", (40, 20), "white").save(tmp_path / "curves.png")
    return tmp_path


def test_card_says_what_the_backbone_is(folder):
    run = read_run(folder)
    assert is_pretraining(run.metrics)
    card = model_card(run, "org/arm", "v1", "0.1", "cc-by-4.0")
    for text in (
        "license: cc-by-4.0",
        "pipeline_tag: image-feature-extraction",
        '"hf-hub:org/arm@v1", pretrained=True, num_classes=NUM_CLASSES, global_pool="avg"',
        "1,200 images without labels",
        "| published, epoch 3 | 0.6012 |",
        "| predicting the mean of every patch | 0.9948 |",
        "python train_arm.py -c args.yaml --unlabeled-dir UNLABELED_DIR",
        "- opt: a&#96;d &#124; &#60;b&#62;",
        "ren2025arm",
    ):
        assert text in card, text
    assert "someone" not in card
    assert "teacher" not in card


def test_a_run_of_pretraining_can_be_published(folder):
    publication = publish(folder, "org/arm", dry_run=True)
    assert {"model.safetensors", "config.json", "README.md"} <= set(publication.files)
    assert load_folder(folder, "run").num_classes == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"best": {}}, "wanted a number as best.loss, got NoneType"),
        ({"best": None}, "wanted a mapping best, got NoneType"),
        ({"pretraining": METRICS["pretraining"] | {"images": "many"}}, "as pretraining.images, got str"),
    ],
)
def test_what_the_card_lacks_is_named(change, message, folder):
    (folder / "metrics.json").write_text(json.dumps(METRICS | change))
    with pytest.raises(UserError, match=message):
        read_run(folder)
