"""Runs that end before their end: killed, resumed, branched off, or started twice."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

import train_ssl
from semivim.data import ImageSource, UnreadableImageError
from semivim.runs.checkpoint import AtomicCheckpointSaver
from semivim.runs.run_folder import find_checkpoints
from tests.training import PLAIN, ROOT, TINY, assert_same_run, refused, run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An unbroken run of six updates in two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(folder)
    return folder


def report(folder):
    """What a run leaves behind, but for its times."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "summary": (folder / "summary.csv").read_text(),
        "best": json.loads((folder / "best.json").read_text()),
        "records": [{k: v for k, v in r.items() if k != "images_per_s"} for r in records],
        "checkpoints": sorted(f.name for f in folder.glob("*.pth.tar") if not f.name.startswith("recovery")),
    }


def epochs_of(folder):
    return [row["epoch"] for row in csv.DictReader((folder / "summary.csv").read_text().splitlines())]


class KilledError(Exception):
    pass


@pytest.mark.parametrize("call", [2, 3], ids=["first epoch", "last epoch"])
def test_kill_while_evaluating_loses_no_epoch(call, whole, tmp_path, monkeypatch):
    folder, calls, evaluate = tmp_path / "run", [], train_ssl.evaluate

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KilledError
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(train_ssl, "evaluate", killed)
    with pytest.raises(KilledError):
        run(folder)
    monkeypatch.setattr(train_ssl, "evaluate", evaluate)
    run(folder, "--resume", "auto")
    assert_same_run(folder, whole)
    assert report(folder) == report(whole)


def test_kill_before_the_checkpoint_of_an_evaluated_epoch_repeats_its_evaluation_only(whole, tmp_path, monkeypatch):
    folder, save = tmp_path / "run", AtomicCheckpointSaver.save_checkpoint

    def killed(self, epoch, metric=None):
        if epoch == 1:
            raise KilledError
        return save(self, epoch, metric)

    monkeypatch.setattr(AtomicCheckpointSaver, "save_checkpoint", killed)
    with pytest.raises(KilledError):
        run(folder)
    monkeypatch.setattr(AtomicCheckpointSaver, "save_checkpoint", save)
    run(folder, "--resume", "auto")
    assert report(folder) == report(whole)


KILL_POINTS = ["recovery-0-1", "recovery-0-3", "last", "recovery-1-4", "recovery-1-6"]  # the third evaluates epoch 0


@pytest.mark.slow
def test_run_killed_again_and_again_ends_as_the_unbroken_one(whole, tmp_path):
    """SIGKILL as soon as a file appears: after an update, while evaluating, and while an epoch is saved."""
    folder = tmp_path / "killed"
    flags = [*TINY, *PLAIN, "--output", str(tmp_path), "--experiment", "killed"]
    flags += ["--recovery-interval", "1", "--resume", "auto"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    reached = []
    for point in KILL_POINTS:
        command = [sys.executable, "train_ssl.py", *flags]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (folder / f"{point}.pth.tar").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, point
        newest, *_ = find_checkpoints("auto", folder)
        reached.append(torch.load(newest, weights_only=False)["task_state"]["progress"]["num_updates"])
    assert reached == sorted(reached)
    assert reached[0] >= 1
    assert reached[-1] == 6
    train_ssl.main(flags)
    assert_same_run(folder, whole)
    assert report(folder) == report(whole)


@pytest.mark.parametrize("target", ["checkpoint-0.pth.tar", "model_best.pth.tar"])
def test_kill_between_the_last_checkpoint_and_its_copies_leaves_none_out(target, whole, tmp_path, monkeypatch):
    folder, duplicate = tmp_path / "run", AtomicCheckpointSaver._duplicate

    def killed(self, src, dst):
        if os.path.basename(dst) == target:
            raise KilledError
        duplicate(self, src, dst)

    monkeypatch.setattr(AtomicCheckpointSaver, "_duplicate", killed)
    with pytest.raises(KilledError):
        run(folder)
    assert not (folder / target).exists()
    monkeypatch.setattr(AtomicCheckpointSaver, "_duplicate", duplicate)
    run(folder, "--resume", "auto")
    assert report(folder) == report(whole)
    assert_same_run(folder, whole)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The first epoch of that run, and where it was killed while saving the second."""
    folder = tmp_path_factory.mktemp("half") / "half"
    run(folder, "--checkpoint-hist", 5)
    os.replace(folder / "checkpoint-0.pth.tar", folder / "last.pth.tar")
    for file in (*folder.glob("recovery-*"), folder / "checkpoint-1.pth.tar"):
        file.unlink()
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--imb-n1", 18], "--imb-n1 is 18, but 20"),
        (["--ssl-method", "ema-teacher"], "--ssl-method is ema-teacher, but lyapema"),
        (["--split-seed", 7], "--split-seed is 7, but 0"),
        (["-b", 2], "--batch-size x --grad-accum-steps x processes is 2, but 4"),
        (["--train-batches-per-epoch", 2], "--train-batches-per-epoch is 2, but 3"),
        (["--unlabeled-ratio", 3], "--unlabeled-ratio is 3, but 2"),
        (["--weight-decay", 0.1], r"--weight-decay is 0\.1, but 0\.05"),
        (["--debias-pseudo", 1], r"--debias-pseudo is 1\.0, but 0\.0"),
        (["--logit-adjust-tau", 1], r"--logit-adjust-tau is 1\.0, but 0\.0"),
        (["--logit-adjust-tau", 1, "--pseudo-prior", "labeled"], "--pseudo-prior is labeled, but none"),
        (["--threshold-mode", "freematch", "--threshold", 0.7], "--threshold-mode is freematch, but fixed"),
        (["--tune-scope", "head"], "--tune-scope is head, but all"),
        (["--model", "semivim_pico"], r"last\.pth\.tar: not a checkpoint of this run"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_flags_that_a_resume_would_ignore_are_refused(flags, message, half, capsys):
    before = (half / "args.yaml").read_bytes()
    with refused(message, capsys):
        run(half, "--resume", "auto", *flags)
    assert (half / "args.yaml").read_bytes() == before


def test_resume_elsewhere_takes_the_split_along_and_leaves_both_runs_whole(whole, tmp_path, capsys):
    before = {file.name: file.read_bytes() for file in whole.iterdir()}
    branch = tmp_path / "branch"
    run(branch, "--resume", whole / "last.pth.tar", "--epochs", 3)
    assert {file.name: file.read_bytes() for file in whole.iterdir()} == before
    assert (branch / "labelled.txt").read_bytes() == before["labelled.txt"]
    assert epochs_of(branch) == ["2"]
    assert (branch / "model_best.pth.tar").exists()  # its own best, not the other run's
    run(branch, "--resume", "auto", "--epochs", 4)
    assert epochs_of(branch) == ["2", "3"]
    assert yaml.safe_load((branch / "args.yaml").read_text())["epochs"] == 4
    with refused("branch holds a run already", capsys):
        run(branch, "--resume", whole / "last.pth.tar")


def test_folder_in_use_is_left_alone(tmp_path, monkeypatch, capsys):
    def taken(*args):
        raise BlockingIOError

    monkeypatch.setattr("fcntl.lockf", taken)
    with refused("run is in use by another process", capsys):
        run(tmp_path / "run")
    assert not (tmp_path / "run" / "args.yaml").exists()


def test_plateau_and_counts_of_broken_images_survive_a_resume(tmp_path, monkeypatch):
    """Both live in what a checkpoint holds of the task."""
    folder, read = tmp_path / "run", ImageSource.image

    def image(self, position):
        if len(self) > 1000 and position % 7 == 0:  # training images only
            raise UnreadableImageError(f"image {position} is broken")
        return read(self, position)

    monkeypatch.setattr(ImageSource, "image", image)
    flags = ["--sched", "plateau", "--patience-epochs", 1]
    with pytest.warns(FutureWarning, match="PlateauLRScheduler is deprecated"):
        unbroken = run(tmp_path / "unbroken", *flags)
        run(folder, *flags, "--epochs", 1)
        resumed = run(folder, *flags, "--resume", "auto")
    assert sum(unbroken["unreadable_images"].values()) > 4
    assert resumed["unreadable_images"] == unbroken["unreadable_images"]
    assert {r["lr"] for r in report(folder)["records"] if "lr" in r} == {0.002}
    assert report(folder)["records"] == report(tmp_path / "unbroken")["records"]


SIGNALLED = """
import os, signal, sys
import train_ssl
from semivim.utils.user_error import UserError
step = train_ssl.optimizer_step
calls = []
def signalled(*args, **kwargs):
    calls.append(1)
    if len(calls) == 2 and int(os.environ.get("RANK", 0)) == int(sys.argv[1]):
        os.kill(os.getpid(), int(sys.argv[2]))
    return step(*args, **kwargs)
train_ssl.optimizer_step = signalled
train_ssl.main(sys.argv[3:])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_signal_ends_a_run_after_its_update_and_it_goes_on_bit_by_bit(number, whole, tmp_path):
    folder = tmp_path / "run"
    flags = [*TINY, *PLAIN, "--output", str(tmp_path), "--experiment", "run"]
    command = [sys.executable, "-c", SIGNALLED, "0", str(int(number)), *flags, "--workers", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 128 + number, done.stderr
    assert f"{number.name}: ending after this update; once more ends at once" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1].endswith("run: stopped at update 2; continue with --resume auto")
    assert [file.name for file in find_checkpoints("auto", folder)] == ["recovery-0-2.pth.tar", "good.pth.tar"]
    run(folder, "--resume", "auto")
    assert_same_run(folder, whole)
    assert report(folder) == report(whole)


def run_on_two_ranks(folder, rank, number, *flags):
    """Train on two processes, one of which gets a signal, 0 for none, in its second update."""
    script = folder.parent / "signalled.py"
    script.write_text(SIGNALLED)
    place = ["--output", str(folder.parent), "--experiment", folder.name]
    flags = [*TINY, *PLAIN, *place, "--device", "cpu", "-b", "2", *flags]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, str(script), str(rank), str(int(number)), *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)


def assert_ranks_stopped(done, folder):
    assert done.returncode != 0
    assert f"{folder.name}: stopped at update 2; continue with --resume auto" in done.stdout, done.stderr
    assert [file.name for file in find_checkpoints("auto", folder)] == ["recovery-0-2.pth.tar", "good.pth.tar"]
    assert 'train_ssl.py", line' not in done.stderr


@pytest.mark.slow
def test_ranks_stop_at_the_same_update_if_the_first_gets_the_signal(tmp_path):
    assert_ranks_stopped(run_on_two_ranks(tmp_path / "run", 0, signal.SIGTERM), tmp_path / "run")


@pytest.mark.slow
def test_ranks_stop_if_the_second_gets_it_and_their_figures_survive_a_resume_on_as_many_or_on_one(tmp_path):
    """The stop is in the middle of an interval and of an epoch."""
    flags = ["--log-interval", "3", "--epochs", "1"]
    unbroken = run_on_two_ranks(tmp_path / "unbroken", 1, 0, *flags)
    assert unbroken.returncode == 0, unbroken.stderr
    assert_ranks_stopped(run_on_two_ranks(tmp_path / "two", 1, signal.SIGTERM, *flags), tmp_path / "two")
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    resumed = run_on_two_ranks(tmp_path / "two", 1, 0, *flags, "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    run(tmp_path / "one", *flags, "--resume", "auto")
    wanted, two, one = (
        next(record for record in report(tmp_path / name)["records"] if "lr" in record)
        for name in ("unbroken", "two", "one")
    )
    assert two == pytest.approx(wanted, rel=1e-5)
    names = ("unbroken", "two", "one")
    seen = [json.loads((tmp_path / n / "metrics.json").read_text())["pseudo_labels"]["seen"] for n in names]
    assert seen == [24, 24, 24]  # 3 updates of 8 images
    assert one["loss_labelled"] == pytest.approx(wanted["loss_labelled"], rel=0.3)
    assert one["skipped"] == 0


DIVERGE = ["--opt", "sgd", "--sched", "cosine", "--epochs", 16, "--val-interval", 16]


@pytest.mark.parametrize("recovery", [0, 1])
def test_diverged_run_goes_on_from_its_last_good_state(recovery, tmp_path, capsys):
    folder = tmp_path / "run"
    with refused(r"not finite in 21 steps in a row .*: \S+/run/last\.pth\.tar holds the last good state", capsys):
        run(folder, *DIVERGE, "--lr", 1e20, "--recovery-interval", recovery)
    state = torch.load(folder / "last.pth.tar", weights_only=False)
    assert max(weight.abs().max() for weight in state["state_dict"].values() if weight.is_floating_point()) < 100
    results = run(folder, *DIVERGE, "--lr", 1e-3, "--epochs", 1, "--val-interval", 1, "--resume", "auto")
    assert results["updates"] == 3
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(record["skipped"] == 0 and record["lr"] < 1 for record in records if "lr" in record)
