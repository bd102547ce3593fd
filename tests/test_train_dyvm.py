import csv
import json
import os
import subprocess
import sys

import pytest
import timm
import torch

from benchmarks import train_dyvm
from semivim.runs.checkpoint import save_model
from tests.training import ROOT, refused

TINY = ["--dataset", "embedded/digits", "--model", "test_dyvm", "--in-chans", "1", "--mean", "0.5", "--std", "0.5"]
TINY += ["-b", "8", "--opt", "adamw", "--lr", "1e-3", "--train-batches-per-epoch", "2", "--epochs", "2", "-j", "0"]
TINY += ["-vb", "250", "--log-interval", "1", "--warmup-epochs", "0", "--hflip", "0", "--color-jitter", "0"]


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "teacher"
    folder.mkdir()
    save_model(timm.create_model("test_vim", in_chans=1, num_classes=10), folder)
    return folder


def run(tmp_path, teacher, *flags):
    return train_dyvm.main(
        [*TINY, "--teacher", f"local-dir:{teacher}", "--output", str(tmp_path), "--experiment", "run", *flags]
    )


def test_a_run_trains_reports_and_goes_on(tmp_path, teacher):
    run(tmp_path, teacher, "--epochs", "1")
    whole = run(tmp_path, teacher, "--resume", "auto", "--model-kwargs", "token_ratio=0.7")
    assert whole["updates"] == 4 and whole == json.loads((tmp_path / "run" / "metrics.json").read_text())
    rows = list(csv.DictReader((tmp_path / "run" / "summary.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert [float(row["train_skipped"]) for row in rows] == [0, 0]
    assert all(0 < float(row["train_kept_tokens"]) < 0.5 and float(row["train_loss_features"]) > 0 for row in rows)
    model = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    assert model.token_ratio == 0.7 and model.head.out_features == 10
    start = timm.create_model(f"local-dir:{teacher}", pretrained=True)
    distance = (model.blocks[0].mixer.in_proj.weight - start.blocks[0].mixer.in_proj.weight).abs().max()
    assert 0 < distance < 0.02, "the student starts from the teacher"


def test_what_does_not_fit_is_refused(tmp_path, teacher, capsys):
    with refused(r"--model test_vim is a Vim, wanted a DyVM", capsys):
        run(tmp_path, teacher, "--model", "test_vim")
    with refused("does not fit the student", capsys):
        run(tmp_path, teacher, "--model-kwargs", "depth=5")
    for flags in (["--initial-checkpoint", "f.pth"], ["--pretrained"], ["--tune-scope", "ssm"]):
        with refused(f"{flags[0]} is not read: the student starts from --teacher", capsys):
            run(tmp_path, teacher, *flags)
    (tmp_path / "empty").mkdir()
    for name, said in (
        (f"local-dir:{tmp_path}/empty", r"--teacher local-dir:\S+/empty lacks config.json"),
        ("vim_tinny", "--teacher: wanted a timm model, .*, got 'vim_tinny'"),
    ):
        with refused(said, capsys):
            run(tmp_path, teacher, "--teacher", name)


def test_a_resumed_run_refuses_what_its_checkpoint_would_overrule(tmp_path, teacher, capsys):
    flags = ["--teacher", str(teacher), "--epochs", "1"]  # a folder without local-dir:
    run(tmp_path, teacher, *flags)
    for change in (["--weight-decay", "0.1"], ["--img-size", "64"]):
        with refused(f"{change[0]}", capsys):
            run(tmp_path, teacher, *flags, "--resume", "auto", *change)


RANKS = """
import sys, torch, torch.distributed as dist
from timm.utils import unwrap_model
from benchmarks import train_dyvm
from tests.ranks import assert_same_on_all_ranks

step, seen = train_dyvm.optimizer_step, []

def checked_step(task, batches, *args, **options):
    model = unwrap_model(task.trainable_module)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = step(task, batches, *args, **options)
    seen.append(batches[0][0].views[0].sum().item())
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still, f"no gradient reaches {still}"
    assert_same_on_all_ranks(model)
    return result

destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: None
train_dyvm.optimizer_step = checked_step
train_dyvm.main(sys.argv[1:])
parts = [None] * dist.get_world_size()
dist.all_gather_object(parts, seen)
assert len(seen) == 2 and not set(parts[0]) & set(parts[1]), "ranks train on the same images"
destroy()
"""


def test_two_processes_train_one_model_with_its_routers_and_gates(tmp_path, teacher):
    (tmp_path / "ranks.py").write_text(RANKS)
    flags = [*TINY, "--epochs", "1", "--weight-decay", "0", "--teacher", f"local-dir:{teacher}", "--device", "cpu"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(tmp_path / "ranks.py"), *flags, "--output", str(tmp_path), "--experiment", "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["updates"] == 2
