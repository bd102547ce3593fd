"""Whose run a folder holds, and what a run keeps when it is resumed."""

import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.scheduler import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import NativeScaler

from semivim.utils.files import one_line

try:
    import fcntl
except ImportError:  # Windows, whose runs are told apart by their checkpoints alone
    fcntl = None  # type: ignore[assignment]

_logger = logging.getLogger(__name__)

# A resumed run reads its split back, and its optimizer's options come with the optimizer's state: other values of
# these would be ignored. Rates, schedule, views, losses and the number of epochs may change.
_SPLIT_FLAGS = (
    "label_fraction", "labels_per_class", "min_per_class", "imb_n1", "imb_m1", "imb_factor_l", "imb_factor_u",
    "unlabeled_include_labeled", "fold", "split_seed",
)  # fmt: skip
_LIST_FLAGS = ("labeled_list", "unlabeled_list")
_OPTIMIZER_FLAGS = (
    "opt", "opt_eps", "opt_betas", "opt_kwargs", "momentum", "weight_decay",
    "layer_decay", "layer_decay_min_scale", "layer_decay_no_opt_scale",
)  # fmt: skip
# Sizes in which a run counts its epochs and its place in the order of images, by the flags that set them.
_SIZES = {
    "labelled_per_update": "--batch-size x --grad-accum-steps x processes",
    "unlabeled_ratio": "--unlabeled-ratio",
    "updates_per_epoch": "--train-batches-per-epoch",
}


def run_folder(output: str, experiment: str, resume: str, model: str, method: str) -> Path:
    """Folder of a run: OUTPUT/EXPERIMENT, or without a name the folder of the file to resume, else one named by time.

    Args:
        output: Folder of runs, '' for output/train.
        experiment: Name of the run, '' for none.
        resume: File to resume, 'auto' or ''.
        model: Name of the model.
        method: Name of the method.
    """
    if resume not in ("", "auto") and not experiment:
        return Path(resume).parent
    model = re.sub(r"[^\w.]+", "-", model)  # hf-hub:org/name is no folder name
    return Path(output or "output/train") / (experiment or f"{time.strftime('%Y%m%d-%H%M%S')}-{model}-{method}")


def find_checkpoint(resume: str, folder: Path) -> Path | None:
    """File to resume, None to start afresh; 'auto' takes the newest of the run folder.

    A recovery file, whose name tells epoch and update, is newer than ``last``: the end of an epoch removes them.
    """
    if resume != "auto":
        return Path(resume) if resume else None
    recovery = list(folder.glob("recovery-*-*.pth.tar"))
    if recovery:
        return max(recovery, key=lambda file: [int(n) for n in re.findall(r"\d+", file.name)])
    last = folder / "last.pth.tar"
    return last if last.is_file() else None


def _plain(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags as args.yaml gives them back, where a tuple is a list, with whole paths."""
    plain = yaml.safe_load(yaml.safe_dump(dict(flags)))
    return plain | {name: os.path.abspath(plain[name]) for name in _LIST_FLAGS if plain.get(name)}


def check_unchanged(saved: Mapping[str, Any], given: Mapping[str, Any], keep_optimizer: bool) -> None:
    """Refuse a value that the resumed run would ignore, or that would renumber its epochs or images.

    Args:
        saved: Flags of the run, ``labelled_per_update`` and ``updates_per_epoch``, as its checkpoint holds them.
        given: The same now.
        keep_optimizer: The optimizer's state is resumed too.

    Raises:
        ValueError: Where one differs; the message names the flag and both values.
    """
    if "labelled_per_update" not in saved:
        raise ValueError("--resume: the checkpoint was written by an older semivim, which this one cannot continue")
    saved, given = _plain(saved), _plain(given)
    for name in (*_SPLIT_FLAGS, *_LIST_FLAGS, *_SIZES, *(_OPTIMIZER_FLAGS if keep_optimizer else ())):
        if saved.get(name) != given[name]:
            flag = _SIZES.get(name) or f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag} is {given[name]}, but {saved.get(name)} in the run to resume, which cannot change it: "
                f"give {saved.get(name)}, or start another run"
            )


def refuse_other_run(folder: Path) -> None:
    """Raise ValueError where a folder holds checkpoints, which a run that does not continue them would overwrite."""
    files = [file.name for file in folder.glob("*.pth.tar") if "tmp" not in file.name]
    if files:
        resume = "auto" if find_checkpoint("auto", folder) else folder / max(files)
        raise ValueError(f"{folder} holds a run already: add --resume {resume} to go on, or name another --experiment")


def refuse_going_back(path: Path, num_epochs: int) -> None:
    """Raise ValueError where a run's best model is of an epoch that its checkpoint has still to train.

    Args:
        path: The checkpoint, in the folder of its run.
        num_epochs: Epochs that it holds.
    """
    best = path.parent / "best.json"
    if best.is_file() and (epoch := json.loads(best.read_text())["epoch"]) >= num_epochs:
        raise ValueError(
            f"--resume {path} goes back behind the best model of its run (epoch {epoch}): "
            "name a new --experiment to branch off from there"
        )


@contextmanager
def own_folder(folder: Path, resume: str, path: Path | None) -> Iterator[None]:
    """Create a run folder and keep other processes out of it until the block, or this process, ends.

    Args:
        folder: The run folder.
        resume: As of `find_checkpoint`.
        path: What `find_checkpoint` found before.

    Raises:
        ValueError: If the folder cannot be written, another process trains in it, or has done so since.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise ValueError(f"--output: cannot write to {folder}: {error.strerror}") from error
    with file:
        try:
            # Unlike flock's, this lock is not inherited by loader processes, which outlive a killed run for seconds.
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{folder} is in use by another process: name another --experiment") from None
        except OSError as error:
            _logger.warning(f"{folder} cannot be locked ({error.strerror}): start no second run in it")
        if path is None or path.parent.resolve() != folder.resolve():
            refuse_other_run(folder)
        elif find_checkpoint(resume, folder) != path:
            raise ValueError(f"{folder}: another process went on with this run meanwhile: start again")
        yield


def restore(
    checkpoint: dict[str, Any],
    path: Path,
    task: TrainingTask,
    optimizer: torch.optim.Optimizer | None,
    scheduler: Scheduler,
    scaler: NativeScaler | None,
) -> None:
    """Put a run back to where its checkpoint was written.

    Args:
        checkpoint: As :class:`~semivim.runs.checkpoint.AtomicCheckpointSaver` wrote it.
        path: Where it was read.
        task: Gets student, teacher and position.
        optimizer: Gets its state; None leaves optimizer, schedule and scaler as they are new.
        scheduler: Gets its state, where it has one.
        scaler: Of the gradients, if they are scaled.

    Raises:
        ValueError: If the checkpoint is another model's.
    """
    try:
        task.load_checkpoint_state(checkpoint["state_dict"], checkpoint["task_state"])
        task.load_checkpoint_state(checkpoint["state_dict_ema"], checkpoint["task_state_ema"], ema=True)
        if optimizer is not None:
            optimizer.load_state_dict(checkpoint["optimizer"])
            load_schedule_state(scheduler, checkpoint["task_state"]["schedule"])
            if scaler is not None and scaler.state_dict_key in checkpoint:
                scaler.load_state_dict(checkpoint[scaler.state_dict_key])
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"--resume {path}: not a checkpoint of this run: {one_line(error)}") from error


def schedule_state(scheduler: Scheduler) -> dict[str, Any]:
    """What a schedule knows beyond its position, {} but for plateau (timm's own ``state_dict`` lacks its counters)."""
    if not isinstance(scheduler, PlateauLRScheduler):
        return {}
    return {"plateau": scheduler.lr_scheduler.state_dict(), "restore_lr": scheduler.restore_lr}


def load_schedule_state(scheduler: Scheduler, state: dict[str, Any]) -> None:
    """Restore what :func:`schedule_state` gave."""
    if isinstance(scheduler, PlateauLRScheduler) and state:
        scheduler.lr_scheduler.load_state_dict(state["plateau"])
        scheduler.restore_lr = state["restore_lr"]
