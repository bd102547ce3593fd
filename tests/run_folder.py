"""A run folder as train_ssl.py leaves it, without the training."""

import json
from pathlib import Path

import timm
import torch
import yaml
from PIL import Image
from timm.models import save_for_hf

import semivim.models  # noqa: F401

CLASSES = ["ant", "bee | wasp", "cat", "dog", "elk"]


def write_run(folder: Path) -> Path:
    """Write the run of an untrained ``test_vim`` with five classes."""
    torch.manual_seed(0)
    model = timm.create_model("test_vim", num_classes=len(CLASSES))
    save_for_hf(model, folder, model_config={"label_names": CLASSES}, safe_serialization=True)
    args = {
        "data_dir": "/home/someone/photos",
        "dataset": "",
        "model": "test_vim",
        "pretrained": False,
        "ssl_method": "lyapema",
        "pseudo_mixup": "ss",
        "epochs": 3,
        "batch_size": 8,
        "lr": 0.001,
        "seed": 7,
        "eval_metric": "top1",
        "output": "/home/someone/runs",
        "experiment": "first",
        "resume": "",
    }
    metrics = {"top1": 61.5, "top5": 100.0, "balanced_acc": 58.25, "worst_class_recall": 12.5}
    teacher = {**metrics, "per_class_recall": [90.0, 80.0, None, 12.5, 50.0], "many": 90.0, "medium": 50.0, "few": 12.5}
    student = {**teacher, "top1": 55.75}
    split = {"sha256": "ab" * 32, "num_labelled": 20, "num_unlabelled": 300, "labels_per_class": [8, 5, 3, 2, 2]}
    (folder / "args.yaml").write_text(yaml.safe_dump(args))
    best = {"model": "student", "epoch": 1, "top1": 63.0}
    results = {"student": student, "teacher": teacher, "best": best, "split": split}
    results["unreadable_images"] = {"/home/someone/photos/ant/7.png": 2}
    (folder / "metrics.json").write_text(json.dumps(results))
    (folder / "summary.csv").write_text("epoch,train_loss,eval_top1\n0,1.5,40\n1,1.2,55\n2,1.1,61.5\n")
    (folder / "labelled.txt").write_text("ant/1.png\n")
    (folder / "model_best.pth.tar").write_bytes(b"a pickle that must stay here")
    Image.new("RGB", (40, 20), "white").save(folder / "curves.png")
    return folder
