import types

import pytest
import torch
import yaml
from timm.task import TrainingTask

from semivim.runs.open_run import find_run, open_run
from semivim.runs.progress import Progress
from semivim.runs.run_folder import GOOD, LAST
from semivim.utils.user_error import UserError


class Task(TrainingTask):
    """A task without labels: a run must need nothing else of one."""

    def __init__(self, progress):
        super().__init__()
        self.model, self.progress = torch.nn.Linear(2, 2), progress

    def get_trainable_module(self, ema=False):
        return None if ema else self.model

    def get_task_state(self, module=None, ema=False):
        return {} if ema else {"progress": self.progress.state_dict()}

    def load_task_state(self, state, strict=True, module=None, ema=False):
        self.progress.load_state_dict(state["progress"])


def find(folder, resume=""):
    return find_run(str(folder.parent), folder.name, resume, "name")


def make():
    progress = Progress()
    task = Task(progress)
    return progress, task, torch.optim.SGD(task.parameters(), lr=0.1)


def opened(found, parts=None, primary=True, **options):
    progress, task, optimizer = parts or make()
    defaults = {
        "primary": primary, "config": {"model": "m", "lr": 0.1}, "sizes": {"images": 8}, "total_updates": 4,
        "train_columns": ("loss",), "eval_columns": (), "wandb_project": None, "log_wandb": False,
        "export": lambda metrics: None, "model": task.model, "optimizer": optimizer, "task": task,
    }  # fmt: skip
    return open_run(found, progress, **defaults | options)


def train(folder, resume="", epochs=1, **options):
    found, parts = find(folder, resume), make()
    progress, task, optimizer = parts
    found.restore(progress, task, optimizer, None, None)
    with opened(found, parts, **options) as run:
        for epoch in range(progress.num_epochs, epochs):
            progress.add({"loss": torch.tensor(1.0)})
            progress.num_epochs = epoch + 1
            with torch.no_grad():
                task.model.weight.fill_(epoch)
            run.saver.save_epoch(epoch, {}, "loss")
    return run


def test_new_run_writes_its_flags_and_checkpoints(tmp_path):
    found = find(tmp_path / "run")
    assert not found.folder.exists()
    assert (found.paths, found.path, found.checkpoint, found.continues) == ([], None, None, False)
    found.restore(*make(), None, None)
    run = train(tmp_path / "run")
    assert yaml.safe_load((run.folder / "args.yaml").read_text()) == {"model": "m", "lr": 0.1}
    with pytest.raises(UserError, match="holds a run already: add --resume auto"):
        find(tmp_path / "run")


def test_resumed_run_goes_on_with_what_was_saved(tmp_path):
    train(tmp_path / "run", epochs=2)
    found = find(tmp_path / "run", "auto")
    assert found.path.name == LAST
    assert found.continues
    progress, task, optimizer = make()
    found.restore(progress, task, optimizer, None, None)
    assert (progress.num_updates, progress.num_epochs) == (2, 2)
    assert (task.model.weight == 1).all()
    found.check_unchanged({"lr": 0.1, "images": 8}, {"lr": "--lr", "images": "--batch-size"})
    with pytest.raises(UserError, match="--batch-size is 4, but 8 in the run to resume"):
        found.check_unchanged({"images": 4}, {"images": "--batch-size"})
    assert len(train(tmp_path / "run", "auto", epochs=3).saver.checkpoint_files) == 3


def test_auto_falls_back_to_the_newest_good_checkpoint_and_says_so(tmp_path, caplog):
    folder = tmp_path / "run"
    run = train(folder, epochs=3, max_history=3)
    run.saver.save_recovery(3, 3)
    for name, keep, place in (("recovery-3-3.pth.tar", 200, None), ("last.pth.tar", None, 700)):
        content = bytearray((folder / name).read_bytes())
        if place:
            content[place] ^= 4
        (folder / name).unlink()  # a checkpoint-N may be the same file
        (folder / name).write_bytes(content[:keep])
    caplog.clear()
    found = find(folder, "auto")
    assert (found.path.name, found.checkpoint["epoch"]) == ("checkpoint-2.pth.tar", 2)
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == 2
    assert "recovery-3-3.pth.tar is not a readable torch file" in lines[0]
    assert "last.pth.tar is damaged: its SHA-256 is" in lines[1]
    assert all(line.endswith("; falling back to " + str(found.path)) for line in lines)
    with opened(found):
        pass
    for path in found.paths:
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"recovery-3-3\.pth\.tar is not a readable"):
        find(folder, "auto")
    with pytest.raises(UserError, match=r"last\.pth\.tar is not a readable"):  # a named one has no stand-in
        find(folder, str(folder / LAST))


def test_branch_takes_a_checkpoint_and_not_the_history(tmp_path):
    train(tmp_path / "run", epochs=2)
    found = find(tmp_path / "branch", str(tmp_path / "run" / LAST))
    assert not found.continues
    assert found.checkpoint["epoch"] == 1
    assert len(train(tmp_path / "branch", str(tmp_path / "run" / LAST), epochs=3).saver.checkpoint_files) == 1


def test_position_behind_the_best_model_is_refused_for_a_named_checkpoint_only(tmp_path):
    train(tmp_path / "run", epochs=2)
    (tmp_path / "run" / "best.json").write_text('{"epoch": 1}')
    named, newest = (find(tmp_path / "run", resume) for resume in (str(tmp_path / "run" / LAST), "auto"))
    named.restore(*make(), None, None)
    (tmp_path / "run" / "best.json").write_text('{"epoch": 2}')
    newest.restore(*make(), None, None)
    with pytest.raises(UserError, match="goes back behind the best model"):
        named.restore(*make(), None, None)


def test_other_ranks_write_nothing(tmp_path, capsys):
    with opened(find(tmp_path / "run"), primary=False) as run:
        run.log.record({"loss": 1.0})
        run.save_recovery(Progress())
    assert run.saver is None
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_folder_is_locked_while_the_run_is_open(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr("fcntl.lockf", lambda file, flags: taken.append(file))
    context = opened(find(tmp_path / "run"))
    with context:
        assert not taken[0].closed
    assert taken[0].closed


def test_weights_and_biases_gets_the_flags(tmp_path, monkeypatch):
    module = types.ModuleType("wandb")
    module.init = lambda **options: seen.append(options)
    seen = []
    monkeypatch.setitem(__import__("sys").modules, "wandb", module)
    context = opened(find(tmp_path / "run"), log_wandb=True, wandb_project="p")
    with context:
        assert seen == [{"project": "p", "name": "run", "config": {"model": "m", "lr": 0.1}}]


def test_run_that_saved_nothing_else_goes_on_from_its_good_copy(tmp_path):
    """A full disk in the first epoch leaves no other, and its message says to continue with --resume auto."""
    with opened(find(tmp_path / "run")):
        pass
    assert [file.name for file in (tmp_path / "run").glob("*.pth.tar")] == [GOOD]
    found = find(tmp_path / "run", "auto")
    assert (found.path.name, found.continues) == (GOOD, True)
    assert len(train(tmp_path / "run", "auto", epochs=2).saver.checkpoint_files) == 2
