"""An autoregressive run of seconds, and what its checkpoints hold."""

import json

import torch

import train_arm

TINY = ["--model", "test_vim", "--img-size", "32", "--cluster", "1", "--dec-dim", "32", "--dec-depth", "1", "-b", "4"]
TINY += ["--epochs", "2", "--train-batches-per-epoch", "3", "--warmup-epochs", "0", "-vb", "63", "--log-interval", "1"]


def run(folder, *flags):
    """Pretrain in ``folder``: six updates in two epochs if the flags do not say otherwise."""
    return train_arm.main([*TINY, "--output", str(folder.parent), "--experiment", folder.name, *map(str, flags)])


def assert_same_run(a, b):
    """The last weights of two runs are the same bits, and their logs the same but for times."""
    first, second = (torch.load(folder / "last.pth.tar", weights_only=False)["state_dict"] for folder in (a, b))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert report(a) == report(b)


def report(folder):
    """What a run leaves behind, but for its times."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "summary": (folder / "summary.csv").read_text(),
        "best": json.loads((folder / "best.json").read_text()),
        "records": [{k: v for k, v in r.items() if k != "images_per_s"} for r in records],
    }
