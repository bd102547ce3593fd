import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver

from semivim.runs import checkpoint
from semivim.runs.checkpoint import (
    RUN_LAYOUT,
    AtomicCheckpointSaver,
    better_model,
    load_schedule_state,
    load_training_checkpoint,
    save_model,
    schedule_state,
)
from semivim.runs.run_folder import CHECKPOINT_SUFFIX, RECOVERY
from semivim.utils.user_error import UserError
from tests.utils.test_files import Evil


def make_saver(folder, export=lambda metrics: None):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    args = Namespace(model="m", run_layout=RUN_LAYOUT)
    return AtomicCheckpointSaver(Path(folder), export, model=model, optimizer=optimizer, args=args, max_history=2)


def test_names_of_timms_saver_are_those_that_this_one_uses():
    """A name that timm changes would be set to no effect, or make files under other names."""
    saver = CheckpointSaver(torch.nn.Linear(1, 1), None)
    for name in ("_replace", "_duplicate", "save_checkpoint", "save_recovery", "cmp"):
        assert callable(getattr(saver, name))
    assert (saver.curr_recovery_file, saver.prev_recovery_file, saver.best_metric) == ("", "", None)
    assert (saver.extension, saver.recovery_prefix) == (CHECKPOINT_SUFFIX, RECOVERY)
    assert set(vars(make_saver("x"))) - set(vars(saver)) == {"folder", "export", "unproven"}


def test_best_model_is_exported_before_its_checkpoint_and_kept_through_a_resume(tmp_path):
    exported = []

    def export(metrics):
        last = tmp_path / "last.pth.tar"
        exported.append((metrics, torch.load(last, weights_only=False)["epoch"] if last.exists() else None))
        (tmp_path / "best.json").write_text(json.dumps(metrics))

    saver = make_saver(tmp_path, export)
    for epoch, metrics in enumerate(({"acc": 1.0}, {}, {"acc": 3.0}, {"acc": 2.0})):
        saver.save_epoch(epoch, metrics, "acc")
    assert exported == [({"epoch": 0, "acc": 1.0}, None), ({"epoch": 2, "acc": 3.0}, 1)]
    again = make_saver(tmp_path, export)
    again.load_state_dict(load_training_checkpoint(tmp_path / "last.pth.tar")["saver"])
    again.save_epoch(4, {"acc": 2.5}, "acc")
    assert len(exported) == 2
    assert again.read_best(5, {"acc": 0.0}) == {"epoch": 2, "acc": 3.0}


def test_better_model_is_named_with_its_metrics():
    teacher, student = {"top1": 60.0, "few": 9.0}, {"top1": 61.0, "few": 8.0}
    candidates = {"teacher": teacher, "student": student}
    assert better_model(candidates, "top1") == {"model": "student", **student}
    assert better_model(candidates, "few") == {"model": "teacher", **teacher}
    assert better_model({"teacher": teacher, "student": teacher}, "top1")["model"] == "teacher"
    assert better_model({"teacher": {}, "student": {}}, "top1") == {}


def test_run_without_an_evaluated_epoch_exports_its_last_model(tmp_path):
    saver = make_saver(tmp_path, lambda metrics: (tmp_path / "best.json").write_text(json.dumps(metrics)))
    assert saver.read_best(7, {"acc": 0.5}) == {"epoch": 7, "acc": 0.5}


def test_checkpoint_of_another_layout_is_refused_by_name_and_version(tmp_path):
    saver = make_saver(tmp_path)
    for layout in (None, RUN_LAYOUT + 1):
        saver.args = Namespace(model="m", **({} if layout is None else {"run_layout": layout}))
        saver.save_checkpoint(0)
        with pytest.raises(
            UserError, match=rf"last\.pth\.tar has run layout {layout or 1}, wanted {RUN_LAYOUT}: "
        ) as e:
            load_training_checkpoint(tmp_path / "last.pth.tar")
        assert "\n" not in str(e.value)


def test_saver_keeps_the_best_and_the_last(tmp_path):
    saver = make_saver(tmp_path)
    for epoch, metric in enumerate((1.0, 3.0, 2.0)):
        with torch.no_grad():
            saver.model.weight.fill_(epoch)
        saver.save_checkpoint(epoch, metric)
    assert load_training_checkpoint(tmp_path / "model_best.pth.tar")["epoch"] == 1
    last = load_training_checkpoint(tmp_path / "last.pth.tar")
    assert last["epoch"] == 2
    assert (last["state_dict"]["weight"] == 2).all()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-1.pth.tar", "checkpoint-2.pth.tar"]


def test_recovery_files_are_newer_than_last(tmp_path):
    saver = make_saver(tmp_path)
    (tmp_path / "recovery-0-3.pth.tar").touch()  # an earlier process left it
    saver.save_recovery(0, 5)
    saver.save_recovery(0, 7)
    saver.save_checkpoint(0, 1.0)
    assert not list(tmp_path.glob("recovery-*"))
    assert saver.curr_recovery_file == saver.prev_recovery_file == ""
    saver.save_recovery(1, 9)
    assert [p.name for p in tmp_path.glob("recovery-*")] == ["recovery-1-9.pth.tar"]


@pytest.mark.parametrize(
    "history",
    [
        {"checkpoint_files": [("{outside}", -1.0), ("../outside", -2.0)]},
        {"checkpoint_files": [("../outside", -1.0)]},
        {"pending": ("1/../../outside", None)},
        {"pending": (True, None)},
        {"checkpoint_files": [("checkpoint-1.pth.tar", "high")]},
        {"checkpoint_files": 3},
        {"best_metric": [1]},
    ],
    ids=str,
)
def test_history_of_a_foreign_checkpoint_removes_nothing(history, tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "run"
    outside.touch()
    folder.mkdir()
    state = {"checkpoint_files": [], "best_epoch": None, "best_metric": None, "pending": (0, None)} | history
    if state["checkpoint_files"] and state["checkpoint_files"] != 3:
        state["checkpoint_files"] = [(n.format(outside=outside), m) for n, m in state["checkpoint_files"]]
    saver = make_saver(folder)
    with pytest.raises(UserError, match=r"^\S+run: (wanted the name|the checkpoint's history is damaged)"):
        saver.load_state_dict(state)
    for epoch in range(4):
        saver.save_checkpoint(epoch, float(epoch))
    assert outside.exists()
    assert len(list(folder.glob("checkpoint-*"))) == saver.max_history


def test_good_checkpoint_is_the_newest_from_which_a_step_was_taken(tmp_path):
    saver = make_saver(tmp_path)

    def weight(name):
        return load_training_checkpoint(tmp_path / f"{name}.pth.tar")["state_dict"]["weight"][0, 0].item()

    def save(value, operation, *args):
        with torch.no_grad():
            saver.model.weight.fill_(value)
        operation(*args)

    save(1, saver.keep_first, 0)
    saver.keep_good()
    assert weight("good") == 1
    save(2, saver.save_recovery, 0, 1)
    saver.keep_good()
    save(3, saver.save_recovery, 0, 2)
    save(4, saver.save_checkpoint, 0)
    assert weight("good") == 2
    saver.keep_good()
    save(5, saver.save_checkpoint, 1)
    save(6, saver.save_recovery, 1, 5)
    assert (weight("good"), weight("last")) == (4, 5)
    saver.roll_back()
    assert (weight("good"), weight("last")) == (4, 4)
    assert not list(tmp_path.glob("recovery-*"))


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), RuntimeError("PytorchStreamWriter failed")], ids=["os", "torch"]
)
def test_full_disk_is_one_line_and_leaves_whole_files(error, tmp_path, monkeypatch):
    saver = make_saver(tmp_path)
    saver.save_checkpoint(0, 1.0)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(state, path):
        Path(path).write_bytes(b"part")
        raise error

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: SimpleNamespace(free=3))
    with pytest.raises(UserError, match=r"^\S+tmp\.pth\.tar: the disk is full: 32 bytes are needed, 3 are free; ") as e:
        saver.save_checkpoint(1, 2.0)
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match=r"recovery_tmp\.pth\.tar: the disk is full"):
        saver.save_recovery(1, 5)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_recovery_files_go_from_the_oldest_on(tmp_path, monkeypatch):
    """A kill in between must not leave an older one as the newest."""
    saver, removed = make_saver(tmp_path), []
    for update in (9, 11, 10, 2):
        (tmp_path / f"recovery-0-{update}.pth.tar").touch()
    monkeypatch.setattr(checkpoint, "remove_checkpoint", lambda folder, name: removed.append(name))
    saver.save_checkpoint(0, 1.0)
    assert removed == [f"recovery-0-{update}.pth.tar" for update in (2, 9, 10, 11)]


def test_epoch_that_is_done_again_stands_in_the_history_once(tmp_path):
    """Resumed from the middle of an epoch whose end was saved before a kill."""
    saver = make_saver(tmp_path)
    saver.save_recovery(0, 3)
    middle = load_training_checkpoint(tmp_path / "recovery-0-3.pth.tar")["saver"]
    saver.save_checkpoint(0, 1.0)
    again = make_saver(tmp_path)
    again.load_state_dict(middle)
    again.save_checkpoint(0, 1.0)
    again.save_checkpoint(1, 1.0)
    assert [(Path(file).name, metric) for file, metric in again.checkpoint_files] == [
        ("checkpoint-0.pth.tar", 1.0),
        ("checkpoint-1.pth.tar", 1.0),
    ]
    assert (tmp_path / "checkpoint-0.pth.tar").exists()
    assert not list(tmp_path.glob("*.link"))


def test_epoch_that_is_done_again_and_worse_than_the_history_leaves_it(tmp_path):
    saver = make_saver(tmp_path)
    for epoch, metric in enumerate((3.0, 2.0)):
        saver.save_checkpoint(epoch, metric)
    saver.save_checkpoint(1, 1.0)
    assert [metric for _, metric in saver.checkpoint_files] == [3.0, 1.0]
    saver.save_checkpoint(2, 0.5)
    assert not (tmp_path / "checkpoint-2.pth.tar").exists()


def test_last_and_best_exist_at_every_moment(tmp_path, monkeypatch):
    """Every file operation of a save is followed by a look at what a kill at that moment would leave."""
    saver = make_saver(tmp_path)
    saver.save_checkpoint(0, 1.0)
    seen = []

    def look(operation):
        def wrapped(*args, **kwargs):
            result = operation(*args, **kwargs)
            seen.append(
                [load_training_checkpoint(tmp_path / n)["epoch"] for n in ("last.pth.tar", "model_best.pth.tar")]
            )
            return result

        return wrapped

    for name in ("replace", "unlink", "link", "remove"):
        monkeypatch.setattr(os, name, look(getattr(os, name)))
    saver.save_checkpoint(1, 2.0)
    assert len(seen) >= 4
    assert seen[-1] == [1, 1]


def test_file_systems_without_hard_links_get_a_copy(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(checkpoint.os, "link", refuse)
    make_saver(tmp_path).save_checkpoint(0, 1.0)
    assert load_training_checkpoint(tmp_path / "model_best.pth.tar")["epoch"] == 0


def test_unreadable_and_unsafe_files_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_saver(tmp_path).save_checkpoint(0, 1.0)
    whole = (tmp_path / "last.pth.tar").read_bytes()
    (tmp_path / "cut.pth.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pth.tar").write_bytes(b"")
    (tmp_path / "evil.pth.tar").write_bytes(pickle.dumps(Evil(), protocol=2))
    torch.save({"state_dict": Evil(), "optimizer": {}}, tmp_path / "evil2.pth.tar")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pth.tar")
    for name in ("cut", "empty", "evil", "evil2", "weights", "absent"):
        with pytest.raises(UserError, match=rf"{name}\.pth\.tar"):
            load_training_checkpoint(tmp_path / f"{name}.pth.tar")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match="that folder holds .*last"):
        load_training_checkpoint(tmp_path / "absent.pth.tar")


def test_saved_model_is_what_timm_loads(tmp_path):
    model = timm.create_model("test_vit", num_classes=3).eval()
    save_model(model, tmp_path, ["a", "b", "c"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    image = torch.randn(1, *model.pretrained_cfg["input_size"])
    assert torch.equal(model(image), loaded(image))
    assert loaded.pretrained_cfg["label_names"] == ["a", "b", "c"]


def plateau():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # timm's word on what is tested here
        scheduler, _ = create_scheduler_v2(
            optimizer, "plateau", num_epochs=20, patience_epochs=2, decay_rate=0.5, noise=[0.3, 0.9], noise_seed=1
        )
    return optimizer, scheduler


def test_plateau_continues_where_it_was(tmp_path):
    metrics = [1.0, 2.0, 2.0, 2.0, None, 2.0, 2.0, 3.0, 2.0, 2.0, 2.0, 2.0]
    optimizer, scheduler = plateau()
    rates = []
    for epoch, metric in enumerate(metrics):
        scheduler.step(epoch + 1, metric)
        rates.append(optimizer.param_groups[0]["lr"])
    assert len(set(rates)) > 4
    for cut in range(1, len(metrics)):
        optimizer, scheduler = plateau()
        for epoch in range(cut):
            scheduler.step(epoch + 1, metrics[epoch])
        torch.save({"schedule": schedule_state(scheduler), "optimizer": optimizer.state_dict()}, tmp_path / "s.pt")
        saved = torch.load(tmp_path / "s.pt", weights_only=True)
        optimizer, scheduler = plateau()
        optimizer.load_state_dict(saved["optimizer"])
        load_schedule_state(scheduler, saved["schedule"])
        scheduler.step(cut)
        assert optimizer.param_groups[0]["lr"] == rates[cut - 1]
        for epoch in range(cut, len(metrics)):
            scheduler.step(epoch + 1, metrics[epoch])
            assert optimizer.param_groups[0]["lr"] == rates[epoch], (cut, epoch)


def test_schedules_of_the_position_have_no_state():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    assert schedule_state(create_scheduler_v2(optimizer, "cosine", num_epochs=3)[0]) == {}


WRITER = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from tests.runs.test_checkpoint import make_saver
saver = make_saver(sys.argv[2])
saver.model.blob = torch.nn.Parameter(torch.zeros(400_000))
print("ready", flush=True)
for epoch in range(10_000):
    saver.save_checkpoint(epoch, float(epoch))
"""


def test_sigkill_while_writing_never_loses_the_last_checkpoint(tmp_path):
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    process = subprocess.Popen([sys.executable, "-c", WRITER, root, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"ready\n"
        while not (tmp_path / "model_best.pth.tar").exists():
            time.sleep(0.001)
        for delay_s in (0.01, 0.013, 0.0171, 0.0233):
            time.sleep(delay_s)
            process.send_signal(signal.SIGSTOP)  # what a kill at this moment leaves
            os.waitpid(process.pid, os.WUNTRACED)  # a signal takes its time on a busy machine
            for name in ("last.pth.tar", "model_best.pth.tar"):
                load_training_checkpoint(tmp_path / name)
            process.send_signal(signal.SIGCONT)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    load_training_checkpoint(tmp_path / "last.pth.tar")


def test_strided_and_tied_weights_are_saved_as_what_they_are(tmp_path):
    model = timm.create_model("test_vim", num_classes=3).to(memory_format=torch.channels_last)
    model.blocks[1].mixer.in_proj.weight = model.blocks[0].mixer.in_proj.weight
    assert not model.patch_embed.proj.weight.is_contiguous()
    save_model(model, tmp_path)
    read = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).state_dict()
    assert all(torch.equal(value, read[name]) for name, value in model.state_dict().items())
    assert not model.patch_embed.proj.weight.is_contiguous()
