"""A training run of seconds, and what its checkpoints hold."""

import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import train_ssl

ROOT = Path(__file__).parent.parent
TINY = ["--model", "test_vim", "-b", "4", "--unlabeled-ratio", "2", "--epochs", "2", "--train-batches-per-epoch", "3"]
TINY += ["--val-interval", "1", "-vb", "250", "--log-interval", "1", "--threshold", "0.05", "--warmup-epochs", "0"]
# In place of the demo's method and its rules for a long tail.
PLAIN = ["--ssl-method", "lyapema", "--pseudo-mixup", "ss"]
PLAIN += ["--debias-pseudo", "0", "--posthoc-debias", "none", "--eval-metric", "top1"]


def run(folder, *flags):
    """Train in ``folder``: six updates in two epochs if the flags do not say otherwise."""
    place = ["--output", str(folder.parent), "--experiment", folder.name]
    return train_ssl.main([*TINY, *PLAIN, *place, *map(str, flags)])


@contextmanager
def refused(message, capsys):
    """The block ends the program with status 2 and one line on the standard error that matches ``message``."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        yield
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert re.search(message, line), line


def states(folder, name="last.pth.tar"):
    """Weights of student and teacher."""
    checkpoint = torch.load(folder / name, weights_only=False)
    return checkpoint["state_dict"], checkpoint["state_dict_ema"]


def assert_same_run(a, b):
    """The last weights of two runs are the same bits."""
    for first, second in zip(states(a), states(b), strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)
