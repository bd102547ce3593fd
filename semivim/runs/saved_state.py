"""Hold what a checkpoint saved against what it is to be loaded into, before anything is loaded."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.scheduler import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import NativeScaler, unwrap_model
from torch import Tensor, nn

from semivim.runs.progress import SUMS
from semivim.utils.user_error import UserError, short


def check_saved(
    checkpoint: Mapping[str, Any],
    what: str,
    task: TrainingTask,
    optimizer: torch.optim.Optimizer | None,
    scheduler: Scheduler,
    scaler: NativeScaler | None,
) -> None:
    """Refuse a checkpoint that does not suit a run, so that what is raised after it is a bug.

    Args:
        checkpoint: As ``load_training_checkpoint`` gives it.
        what: What an error calls it.
        task: See ``checkpoint.restore``.
        optimizer: See there.
        scheduler: See there.
        scaler: See there.

    Raises:
        UserError: Naming the first entry that differs.
    """
    _check_weights(checkpoint["state_dict"], unwrap_model(task.get_eval_model()), f"{what}: state_dict")
    _check_like(_entry(checkpoint, "task_state", what), task.get_task_state(), f"{what}: task_state")
    for name in SUMS:  # a run that has not begun cannot tell which they are
        _check_sums(checkpoint["task_state"]["progress"][name], f"{what}: task_state: progress: {name}")
    if task.has_ema():
        teacher: Any = unwrap_model(task.get_eval_model(ema=True))
        _check_weights(_entry(checkpoint, "state_dict_ema", what), teacher, f"{what}: state_dict_ema")
        if wanted := task.get_task_state(ema=True):
            _check_like(_entry(checkpoint, "task_state_ema", what), wanted, f"{what}: task_state_ema")
    if optimizer is None:
        return
    _check_optimizer(checkpoint["optimizer"], optimizer, f"{what}: optimizer")
    schedule = checkpoint["task_state"]["progress"].get("schedule")
    if isinstance(scheduler, PlateauLRScheduler) and schedule:
        wanted = {"plateau": scheduler.lr_scheduler.state_dict(), "restore_lr": None}
        _check_like(schedule, wanted, f"{what}: schedule")
    if scaler is not None and (saved := checkpoint.get(scaler.state_dict_key)) is not None:
        _check_like(saved, scaler.state_dict(), f"{what}: {scaler.state_dict_key}")


def _entry(checkpoint: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in checkpoint:
        raise UserError(f"{what}: it lacks {name}")
    return checkpoint[name]


def _check_weights(saved: Any, model: nn.Module | None, what: str) -> None:
    """Compare names and shapes of tensors."""
    wanted = model.state_dict() if model is not None else {}
    _check_keys(saved, wanted, what)
    for name, value in wanted.items():
        found = tuple(saved[name].shape) if isinstance(saved[name], Tensor) else short(saved[name])
        if found != tuple(value.shape):
            raise UserError(f"{what}: {name} has shape {found}, wanted {tuple(value.shape)}")


def _check_like(saved: Any, wanted: Mapping[str, Any], what: str) -> None:
    """Compare keys of nested mappings, types of numbers and containers, shapes of tensors; None was not known yet."""
    _check_keys(saved, wanted, what)
    for name, value in wanted.items():
        if isinstance(value, Mapping) and value:
            _check_like(saved[name], value, f"{what}: {name}")
        elif isinstance(value, Mapping | list) and not isinstance(saved[name], type(value)):
            raise UserError(f"{what}: {name} is {short(saved[name])}, wanted a {type(value).__name__}")
        elif isinstance(value, Tensor) and getattr(saved[name], "shape", None) != value.shape:
            raise UserError(f"{what}: {name} is {short(saved[name])}, wanted a tensor of shape {tuple(value.shape)}")
        elif isinstance(value, int | float) and not _is_number(saved[name]):
            raise UserError(f"{what}: {name} is {short(saved[name])}, wanted a number")


def _check_sums(saved: Mapping[str, Any], what: str) -> None:
    """Check that each sum is a tensor of floats."""
    for name, value in saved.items():
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            raise UserError(f"{what}: {name} is {short(value)}, wanted a tensor of floats")


def _is_number(value: Any) -> bool:
    """Whether a value is a number that a float can hold."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _check_keys(saved: Any, wanted: Mapping[str, Any], what: str) -> None:
    if not isinstance(saved, Mapping):
        raise UserError(f"{what} is {short(saved)}, wanted a dict")
    lacking = [name for name in wanted if name not in saved]
    surplus = [name for name in saved if name not in wanted]
    if lacking or surplus:
        words = "lacks" if lacking else "has, but this run does not,"
        names = ", ".join(map(str, (lacking or surplus)[:3]))
        raise UserError(f"{what} {words} {names}{', ...' if len(lacking or surplus) > 3 else ''}")


def _check_optimizer(saved: Any, optimizer: torch.optim.Optimizer, what: str) -> None:
    """Compare the groups of parameters; what an optimizer keeps of each parameter is its own."""
    wanted = optimizer.state_dict()
    _check_keys(saved, wanted, what)
    groups, ours = saved["param_groups"], wanted["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(ours):
        raise UserError(f"{what}: param_groups is {short(groups)}, wanted {len(ours)} groups")
    for number, (group, own) in enumerate(zip(groups, ours, strict=True)):
        params = group.get("params") if isinstance(group, Mapping) and "lr" in group else None
        if not isinstance(params, list) or len(params) != len(own["params"]):
            raise UserError(f"{what}: group {number} is {short(group)}, wanted lr and {len(own['params'])} params")
