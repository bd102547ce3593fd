"""Checkpoints of a run and its best model, written so that a kill at any moment leaves whole files."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import save_for_hf
from timm.scheduler import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import CheckpointSaver, NativeScaler
from torch import nn

from semivim.runs.run_folder import (
    BEST,
    CHECKPOINT_SUFFIX,
    CONFIG,
    GOOD,
    LAST,
    MODEL_BEST,
    PIXELS,
    RECOVERY,
    WEIGHTS,
    checkpoints_of_kind,
    numbered_checkpoint,
    read_best,
    remove_checkpoint,
)
from semivim.runs.saved_state import check_saved
from semivim.utils.checksum import seal_checkpoint, seal_safetensors
from semivim.utils.files import atomic_path, flush, full_disk_is_one_line, load_untrusted, write_text
from semivim.utils.pixels import PixelRules
from semivim.utils.user_error import UserError, one_line, short

ADJUSTMENT = "logit_adjustment"  # attribute of a model, and key of config.json: prior removed from its head
RUN_LAYOUT = 3  # of checkpoints; 1 had the run's position among the task's losses, 2 no sums of the whole run


class AtomicCheckpointSaver(CheckpointSaver):
    """timm's checkpoint saver without the moments in which a kill loses ``last`` or ``model_best``, and the best model.

    timm unlinks the old file before it renames the new one; here the rename itself replaces it.

    Args:
        folder: The run's folder.
        export: Writes the model and its metrics where an epoch is the best so far.
        **options: More of timm's arguments.
    """

    def __init__(self, folder: Path, export: Callable[[dict[str, Any]], None], **options: Any) -> None:
        super().__init__(checkpoint_dir=str(folder), recovery_dir=str(folder), recovery_prefix=RECOVERY, **options)
        assert self.extension == CHECKPOINT_SUFFIX
        self.folder, self.export = folder, export
        self.unproven: Path | None = None  # the newest checkpoint, while no step has been taken from it

    def save_epoch(self, epoch: int, metrics: dict[str, Any], metric_name: str) -> bool:
        """Save the end of an epoch, and export the model if it is the best so far.

        Args:
            epoch: The epoch.
            metrics: Metrics of the model to export (see :func:`better_model`), {} if the epoch was not evaluated.
            metric_name: The one that says how good it is.

        Returns:
            Whether it is.
        """
        metric = metrics.get(metric_name)
        is_best = metric is not None and (self.best_metric is None or self.cmp(metric, self.best_metric))
        # The model first: killed in between, the epoch is done again and finds the same best.
        if is_best:
            self.export({"epoch": epoch, **metrics})
        self.save_checkpoint(epoch, metric)
        return is_best

    def read_best(self, epoch: int, metrics: dict[str, Any]) -> dict[str, Any]:
        """Epoch and metrics of the best model; the model as it is now becomes it where no epoch was evaluated."""
        if not read_best(self.folder):
            self.export({"epoch": epoch, **metrics})
        return read_best(self.folder)

    def save_checkpoint(self, epoch: int, metric: float | None = None) -> tuple[float | None, int | None]:
        """Save the end of an epoch, as timm's saver does; recovery files, now older than ``last``, go.

        timm's method is written again here because a run that was killed within it has to do its second half.
        """
        temporary = self.folder / f"tmp{CHECKPOINT_SUFFIX}"
        self._save(str(temporary), epoch, metric)
        self._replace(str(temporary), str(self.folder / LAST))
        self._keep_copy(epoch, metric)
        self._remove_recovery()
        self.unproven = self.folder / LAST
        return self.best_metric, self.best_epoch

    def _remove_recovery(self) -> None:
        for file in reversed(checkpoints_of_kind(self.folder, RECOVERY)):  # a kill in between leaves the newest
            remove_checkpoint(self.folder, file.name)
        self.curr_recovery_file = self.prev_recovery_file = ""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history of checkpoints.

        Raises:
            UserError: If the history is not one that a run writes: its names are those of files to remove one day.
        """
        try:
            files = [
                (numbered_checkpoint(self.folder, name), metric) for name, metric in state_dict["checkpoint_files"]
            ]
            epoch, pending_metric = state_dict["pending"]
            metrics = [*(metric for _, metric in files), pending_metric, state_dict["best_metric"]]
            known = all(metric is None or isinstance(metric, int | float) for metric in metrics)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.folder}: the checkpoint's history is damaged: {one_line(error)}") from error
        if not known or type(epoch) is not int:
            raise UserError(
                f"{self.folder}: the checkpoint's history is damaged: epoch {short(epoch)}, metrics {short(metrics)}"
            )
        super().load_state_dict(state_dict)

    def finish_save(self, epoch: int, metric: float | None) -> None:
        """Make the copies of ``last`` that a kill in the middle of :meth:`save_checkpoint` left out.

        Args:
            epoch: The epoch whose end ``last`` holds.
            metric: Its metric, None if it was not evaluated.
        """
        if Path(self._checkpoint_path(epoch)) not in [Path(file) for file, _ in self.checkpoint_files]:
            self._keep_copy(epoch, metric)
        elif self.best_epoch == epoch:
            self._duplicate(str(self.folder / LAST), str(self.folder / MODEL_BEST))

    def _keep_copy(self, epoch: int, metric: float | None) -> None:
        """Copy ``last`` to a numbered checkpoint if it earns a place, by the rule of timm's ``save_checkpoint``."""
        path = self._checkpoint_path(epoch)
        # An epoch that is done again has a copy already; twice in the history, its worse entry would remove it one day.
        self.checkpoint_files = [file for file in self.checkpoint_files if file[0] != path]
        if len(self.checkpoint_files) >= self.max_history:
            worst = self.checkpoint_files[-1][1]
            if worst is not None and (metric is None or not self.cmp(metric, worst)):
                return
            self._cleanup_checkpoints(1)
        self._duplicate(str(self.folder / LAST), path)
        self._track_checkpoint(path, epoch, metric)

    def _cleanup_checkpoints(self, trim: int = 0) -> None:
        kept = max(0, self.max_history - min(len(self.checkpoint_files), trim))
        for path, _ in self.checkpoint_files[kept:]:
            remove_checkpoint(self.folder, Path(path).name)
        self.checkpoint_files = self.checkpoint_files[:kept]

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        size = _tensor_bytes(self.optimizer.state_dict()) + _tensor_bytes((self.task or self.model).state_dict())
        with full_disk_is_one_line(Path(save_path), size):
            super()._save(save_path, epoch, metric)
            seal_checkpoint(Path(save_path))

    def save_recovery(self, epoch: int, batch_idx: int = 0) -> None:
        """Save the state within an epoch."""
        super().save_recovery(epoch, batch_idx)
        self.unproven = Path(self.curr_recovery_file)

    def keep_first(self, epoch: int) -> None:
        """Save the state that a new run starts from as the good one, until a step is taken from a later one."""
        with atomic_path(self.folder / GOOD) as temporary:
            self._save(str(temporary), epoch)

    def keep_good(self) -> None:
        """Keep the newest checkpoint apart, as a step has been taken from its state: its gradients are finite."""
        if self.unproven is not None:
            self._duplicate(str(self.unproven), str(self.folder / GOOD))
            self.unproven = None

    def roll_back(self) -> None:
        """Make the good state the newest one, in the place of those that only skipped steps followed."""
        self._duplicate(str(self.folder / GOOD), str(self.folder / LAST))
        self._remove_recovery()

    def _replace(self, src: str, dst: str) -> None:
        flush(Path(src))
        os.replace(src, dst)
        flush(Path(dst).parent)

    def _duplicate(self, src: str, dst: str) -> None:
        link = f"{dst}.link"
        Path(link).unlink(missing_ok=True)
        try:
            os.link(src, link)
        except OSError:  # a file system without hard links
            shutil.copy2(src, link)
        os.replace(link, dst)
        Path(link).unlink(missing_ok=True)  # where both were the same file, the system leaves both names


def _tensor_bytes(value: Any) -> int:
    """Bytes of the tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(map(_tensor_bytes, parts))


def load_training_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a file written by :class:`AtomicCheckpointSaver` (see :func:`load_untrusted`).

    Raises:
        UserError: If the file is missing, truncated, no training checkpoint or of another layout; one line names it.
    """
    if not os.path.isfile(path):
        near = sorted(str(f) for f in Path(path).parent.glob(f"*{CHECKPOINT_SUFFIX}"))
        raise UserError(f"no checkpoint at {path}" + (f"; that folder holds {', '.join(near)}" if near else ""))
    checkpoint = load_untrusted(path)
    if lacking := {"state_dict", "optimizer", "args", "saver"} - checkpoint.keys():
        raise UserError(f"{path} is not a training checkpoint: it lacks {', '.join(sorted(lacking))}")
    layout = getattr(checkpoint["args"], "run_layout", 1)
    if type(layout) is not int or layout != RUN_LAYOUT:
        raise UserError(
            f"{path} has run layout {short(layout)}, wanted {RUN_LAYOUT}: another version of semivim wrote it; "
            f"go on with that one, or start a new run from its weights: --initial-checkpoint {path}"
        )
    return checkpoint


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
        task: Gets its model, the average of it where it has one, and the run's progress.
        optimizer: Gets its state; None leaves optimizer, schedule and scaler as they are new.
        scheduler: Gets its state, where it has one.
        scaler: Of the gradients, if they are scaled.

    Raises:
        UserError: If the checkpoint is another model's or run's (see ``check_saved``), or the optimizer or the teacher
            cannot go on from what it holds of them.
    """
    what = f"--resume {path}: not a checkpoint of this run"
    check_saved(checkpoint, what, task, optimizer, scheduler, scaler)
    try:
        task.load_checkpoint_state(checkpoint["state_dict"], checkpoint["task_state"])
        if task.has_ema():
            task.load_checkpoint_state(checkpoint["state_dict_ema"], checkpoint.get("task_state_ema"), ema=True)
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    if optimizer is not None:
        rates = [group["lr"] for group in optimizer.param_groups]
        try:
            optimizer.load_state_dict(checkpoint["optimizer"])
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            raise UserError(f"{what}: optimizer: {one_line(error)}") from error
        if not checkpoint["task_state"]["progress"]["num_epochs"]:  # a schedule over epochs sets no other before
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        load_schedule_state(scheduler, checkpoint["task_state"]["progress"]["schedule"])
        if scaler is not None and scaler.state_dict_key in checkpoint:
            scaler.load_state_dict(checkpoint[scaler.state_dict_key])


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


def better_model(candidates: Mapping[str, Mapping[str, Any]], metric_name: str) -> dict[str, Any]:
    """Name, as ``model``, and metrics of the model with the highest metric; the first of equals.

    Args:
        candidates: Metrics of each model by its name; all {} if they were not evaluated, which gives {}.
        metric_name: The metric.
    """
    if not all(candidates.values()):
        return {}
    name = max(candidates, key=lambda name: candidates[name][metric_name])
    return {"model": name, **candidates[name]}


def save_best(
    models: Mapping[str, nn.Module],
    folder: Path,
    label_names: Sequence[str] | None,
    data_config: dict[str, Any],
    rules: PixelRules,
    metrics: dict[str, Any],
) -> None:
    """Write the model that the metrics name (see :func:`save_model`) and best.json, its name, epoch and metrics."""
    save_model(models[metrics["model"]], folder, label_names, data_config, rules)
    write_text(folder / BEST, json.dumps(metrics))


def save_model(
    model: nn.Module,
    folder: Path,
    label_names: Sequence[str] | None = None,
    data_config: dict[str, Any] | None = None,
    rules: PixelRules | None = None,
) -> None:
    """Write model.safetensors and config.json into a folder, each whole or not at all.

    ``timm.create_model(NAME, checkpoint_path=FOLDER/model.safetensors)`` and ``local-dir:FOLDER`` load them.

    Args:
        model: A model made by timm's registry.
        folder: An existing folder.
        label_names: Names of the classes; left out where their number is not the model's.
        data_config: Preprocessing that the model was evaluated with (timm's ``resolve_input_data_config``); None takes
            the architecture's.
        rules: How pixels became 8 bits; left out if None.
    """
    config: dict[str, Any] = {} if rules is None else {PIXELS: rules._asdict()}
    if adjusted := getattr(model, ADJUSTMENT, None):
        config[ADJUSTMENT] = adjusted
    if label_names and len(label_names) == model.num_classes:
        config["label_names"] = list(label_names)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".model-") as temporary:
        with full_disk_is_one_line(Path(temporary) / WEIGHTS, _tensor_bytes(model.state_dict())):
            hook = model.register_state_dict_post_hook(_one_plain_tensor_each)
            try:
                save_for_hf(model, temporary, model_config=config, safe_serialization=True, data_config=data_config)
            finally:
                hook.remove()
            seal_safetensors(Path(temporary) / WEIGHTS)
        shutil.copymode(Path(temporary) / CONFIG, Path(temporary) / WEIGHTS)  # readable by others
        for name in (WEIGHTS, CONFIG):
            flush(Path(temporary) / name)
            os.replace(Path(temporary) / name, folder / name)


# ARG001: torch passes its hooks more than this one reads
def _one_plain_tensor_each(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:  # noqa: ARG001
    """Lay out the tensors of a state dict row by row, without memory in common, as safetensors wants them."""
    seen: set[int] = set()
    for name, value in state.items():
        plain = value.contiguous()
        storage = plain.untyped_storage().data_ptr()
        state[name] = plain.clone() if storage in seen else plain
        seen.add(storage)
