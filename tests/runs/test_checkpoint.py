import os
import pickle
import signal
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import timm
import torch

from semivim.runs import checkpoint
from semivim.runs.checkpoint import AtomicCheckpointSaver, load_training_checkpoint, save_model
from tests.utils.test_files import Evil


def make_saver(folder):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    folders = {"checkpoint_dir": str(folder), "recovery_dir": str(folder)}
    return AtomicCheckpointSaver(model, optimizer, args=Namespace(model="m"), max_history=2, **folders)


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
    saver.save_recovery(1, 9)
    assert [p.name for p in tmp_path.glob("recovery-*")] == ["recovery-1-9.pth.tar"]


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
        with pytest.raises(ValueError, match=rf"{name}\.pth\.tar"):
            load_training_checkpoint(tmp_path / f"{name}.pth.tar")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="that folder holds .*last"):
        load_training_checkpoint(tmp_path / "absent.pth.tar")


def test_saved_model_is_what_timm_loads(tmp_path):
    model = timm.create_model("test_vit", num_classes=3).eval()
    save_model(model, tmp_path, ["a", "b", "c"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    image = torch.randn(1, *model.pretrained_cfg["input_size"])
    assert torch.equal(model(image), loaded(image))
    assert loaded.pretrained_cfg["label_names"] == ["a", "b", "c"]


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
    assert process.stdout.readline() == b"ready\n"
    while not (tmp_path / "model_best.pth.tar").exists():
        time.sleep(0.001)
    for delay_s in (0.01, 0.013, 0.0171, 0.0233):
        time.sleep(delay_s)
        process.send_signal(signal.SIGSTOP)  # what a kill at this moment leaves
        for name in ("last.pth.tar", "model_best.pth.tar"):
            load_training_checkpoint(tmp_path / name)
        process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    load_training_checkpoint(tmp_path / "last.pth.tar")
