"""A checkpoint that does not suit is one line; what is raised after that check is a bug and keeps its traceback."""

import copy
import re

import pytest
import timm
import torch
from timm.utils import NativeScaler

from semivim.runs.checkpoint import restore, schedule_state
from semivim.runs.progress import Progress
from semivim.task.semi_supervised import SemiSupervisedTask
from semivim.utils.user_error import UserError
from tests.runs.test_checkpoint import plateau

LIKE = "--resume a.pth: not a checkpoint of this run: "


def make(name="test_vim", **options):
    model = timm.create_model(name, num_classes=3)
    task = SemiSupervisedTask(model, 3, progress=Progress(), **options)
    task.setup_ema()
    return task, torch.optim.AdamW(model.parameters(), lr=0.1), plateau()[1], NativeScaler(device="cpu")


def saved(task, optimizer, scheduler, scaler):
    """What timm's saver writes."""
    task.progress.schedule = schedule_state(scheduler)
    sum(p.sum() for p in task.trainable_module.parameters()).backward()
    optimizer.step()
    content = {
        "state_dict": task.trainable_module.state_dict(),
        "state_dict_ema": task.trainable_module_ema.module.state_dict(),
        "task_state": task.get_task_state(),
        "task_state_ema": task.get_task_state(ema=True),
        "optimizer": optimizer.state_dict(),
        "amp_scaler": scaler.state_dict(),
    }
    return copy.deepcopy(content)


def test_a_whole_checkpoint_is_taken():
    parts = make()
    checkpoint = saved(*parts)
    again = make()
    restore(checkpoint, "a.pth", *again)
    for name, value in again[0].trainable_module.state_dict().items():
        assert torch.equal(value, checkpoint["state_dict"][name])


def set_in(value, keys, new):
    """Replace, or with ``new`` None delete, an entry of nested containers."""
    for key in keys[:-1]:
        value = value[key]
    if new is None:
        del value[keys[-1]]
    else:
        value[keys[-1]] = new


@pytest.mark.parametrize(
    ("keys", "new", "message"),
    [
        (["state_dict"], 3, "state_dict is 3, wanted a dict"),
        (
            ["state_dict", "head.weight"],
            torch.zeros(4, 32),
            r"state_dict: head.weight has shape (4, 32), wanted (3, 32)",
        ),
        (["state_dict", "head.weight"], 3, "state_dict: head.weight has shape 3, wanted"),
        (["state_dict", "head.weight"], None, "state_dict lacks head.weight"),
        (["state_dict", "other"], torch.zeros(1), "state_dict has, but this run does not, other"),
        (["state_dict_ema"], None, "it lacks state_dict_ema"),
        (["state_dict_ema", "norm.weight"], torch.zeros(2), "state_dict_ema: norm.weight has shape (2,), wanted (32,)"),
        (["task_state"], None, "it lacks task_state"),
        (["task_state", "progress"], None, "task_state lacks progress"),
        (["task_state", "progress"], {}, "task_state: progress lacks num_updates, num_epochs, interval, ..."),
        (["task_state", "progress", "num_epochs"], "x", "task_state: progress: num_epochs is 'x', wanted a number"),
        (["task_state", "progress", "interval"], 3, "task_state: progress: interval is 3, wanted a dict"),
        (
            ["task_state", "progress", "interval"],
            {"a": None},
            "task_state: progress: interval: a is None, wanted a tens",
        ),
        (["task_state", "progress", "epoch"], {"a": torch.ones(1) > 0}, "task_state: progress: epoch: a is tensor("),
        (["task_state", "progress", "run"], {"kept": 3}, "task_state: progress: run: kept is 3, wanted a tensor of "),
        (["task_state", "progress", "schedule"], {"plateau": 3}, "schedule lacks restore_lr"),
        (["task_state", "progress", "schedule", "plateau"], {"a": 1}, "schedule: plateau lacks "),
        (["task_state_ema"], None, "it lacks task_state_ema"),
        (["task_state_ema", "v"], None, "task_state_ema lacks v"),
        (["task_state_ema", "v"], 10**400, "task_state_ema: v is 1000"),
        (["optimizer"], {}, "optimizer lacks state, param_groups"),
        (["optimizer", "param_groups"], [], "optimizer: param_groups is [], wanted 1 groups"),
        (["optimizer", "param_groups", 0], 3, "optimizer: group 0 is 3, wanted"),
        (["optimizer", "param_groups", 0, "params"], [0], "optimizer: group 0 is {"),
        (["amp_scaler"], {"scale": 1.0}, "amp_scaler lacks growth_factor"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_does_not_suit_is_named(keys, new, message):
    parts, checkpoint = make(), saved(*make())
    before = {name: value.clone() for name, value in parts[0].trainable_module.state_dict().items()}
    set_in(checkpoint, keys, new)
    with pytest.raises(UserError, match="^" + re.escape(LIKE + message)) as error:
        restore(checkpoint, "a.pth", *parts)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in parts[0].trainable_module.state_dict().items())


@pytest.mark.parametrize(
    ("stats", "got"), [({"alpha": 1.0, "x": 2.0}, ".*'x': 2.0"), ({}, "{}"), (3, "3"), (torch.zeros(2), "tensor")]
)
def test_figures_of_another_teacher_are_refused(stats, got):
    parts = make()
    checkpoint = saved(*parts)
    checkpoint["task_state"]["lyap_stats"] = stats
    with pytest.raises(UserError, match=f"lyap_stats of a checkpoint: wanted .*'alpha', .*, got {got}"):
        restore(checkpoint, "a.pth", *parts)


def test_a_step_of_an_optimizer_that_no_float_holds_is_named():
    parts = make()
    checkpoint = saved(*parts)
    checkpoint["optimizer"]["state"] = {0: {"step": 10**400}}
    with pytest.raises(UserError, match="not a checkpoint of this run: optimizer: int too large to convert to float"):
        restore(checkpoint, "a.pth", *parts)


@pytest.mark.parametrize("kind", [KeyError, RuntimeError, ValueError])
def test_a_bug_while_loading_keeps_its_traceback(kind, monkeypatch):
    def broken(self, *args, **kwargs):
        raise kind("a bug")

    parts = make()
    checkpoint = saved(*parts)
    monkeypatch.setattr(SemiSupervisedTask, "load_task_state", broken)
    with pytest.raises(kind) as error:
        restore(checkpoint, "a.pth", *parts)
    assert not isinstance(error.value, UserError)
