"""Autoregressive runs that end before their end: killed, signalled and resumed."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import train_arm
from semivim.runs.checkpoint import AtomicCheckpointSaver
from semivim.runs.run_folder import find_checkpoints
from tests.arm_training import TINY, assert_same_run, run
from tests.training import ROOT, refused

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An unbroken run of six updates in two epochs."""
    folder = tmp_path_factory.mktemp("arm") / "whole"
    run(folder)
    return folder


class KilledError(Exception):
    pass


@pytest.mark.parametrize("update", [1, 4])
def test_run_goes_on_bit_by_bit_from_a_checkpoint_within_an_epoch(update, whole, tmp_path, monkeypatch):
    folder, save = tmp_path / "run", AtomicCheckpointSaver.save_recovery

    def killed(self, epoch, batch_idx=0):
        save(self, epoch, batch_idx)
        if batch_idx == update:
            raise KilledError

    monkeypatch.setattr(AtomicCheckpointSaver, "save_recovery", killed)
    with pytest.raises(KilledError):
        run(folder, "--recovery-interval", 1)
    monkeypatch.setattr(AtomicCheckpointSaver, "save_recovery", save)
    run(folder, "--resume", "auto")
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_run_killed_again_and_again_ends_as_the_unbroken_one(whole, tmp_path):
    """SIGKILL as soon as a file appears: after an update, while evaluating, and while an epoch is saved."""
    folder = tmp_path / "killed"
    flags = [*TINY, "--output", str(tmp_path), "--experiment", "killed", "--recovery-interval", "1", "--resume", "auto"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    for point in ("recovery-0-1", "recovery-0-3", "last", "recovery-1-6"):
        command = [sys.executable, "train_arm.py", *flags]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (folder / f"{point}.pth.tar").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, point
    train_arm.main(flags)
    assert_same_run(folder, whole)


SIGNALLED = """
import os, signal, sys
import train_arm
step, calls = train_arm.optimizer_step, []
def signalled(*args, **kwargs):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(*args, **kwargs)
train_arm.optimizer_step = signalled
train_arm.main(sys.argv[1:])
"""


def test_sigterm_ends_a_run_after_its_update_and_it_goes_on_bit_by_bit(whole, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", SIGNALLED, *TINY, "--output", str(tmp_path), "--experiment", "run"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "Traceback" not in done.stderr
    assert [file.name for file in find_checkpoints("auto", folder)] == ["recovery-0-2.pth.tar", "good.pth.tar"]
    run(folder, "--resume", "auto")
    assert_same_run(folder, whole)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--directions", "both"], "--directions is both, but forward"),
        (["--cluster", "2"], "--cluster is 2, but 1"),
        (["--img-size", "64"], "--img-size is 64, but 32"),
        (["-b", "2"], "--batch-size x --grad-accum-steps x processes is 2, but 4"),
        (
            ["--dataset", "embedded/digits", "--workers", "0"],
            r"--unlabeled-dir\) is 1297, but 1134",
        ),
        (["--weight-decay", "0.1"], r"--weight-decay is 0\.1, but 0\.05"),
        (["--dec-dim", "64"], "not a checkpoint of this run"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_a_resume_cannot_change_is_refused(flags, message, whole, capsys):
    before = (whole / "args.yaml").read_bytes()
    with refused(message, capsys):
        run(whole, "--resume", whole / "last.pth.tar", *flags)
    assert (whole / "args.yaml").read_bytes() == before
