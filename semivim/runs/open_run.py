"""Begin a run or go on with one: find its checkpoint, lock its folder, open its log and its checkpoint saver."""

import importlib
import logging
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import yaml
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import NativeScaler

from semivim.runs.checkpoint import RUN_LAYOUT, AtomicCheckpointSaver, load_training_checkpoint, restore
from semivim.runs.optimizer_step import SkippedSteps
from semivim.runs.progress import Progress
from semivim.runs.run_folder import (
    ARGS,
    GOOD,
    LAST,
    check_unchanged,
    find_checkpoints,
    lock_folder,
    read_best,
    refuse_going_back,
    refuse_other_run,
    run_folder,
)
from semivim.runs.run_log import RunLog
from semivim.utils.files import write_text
from semivim.utils.process_group import in_process_group
from semivim.utils.terminal import escape
from semivim.utils.user_error import UserError

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundRun:
    """A run's folder, the ``resume`` flag, what it names, and the checkpoint to go on from, None for a new run."""

    folder: Path
    resume: str
    paths: list[Path]
    path: Path | None
    checkpoint: dict[str, Any] | None

    @property
    def continues(self) -> bool:
        """Whether the checkpoint is one of the folder, not another run's to branch off from."""
        return self.path is not None and self.path.parent.resolve() == self.folder.resolve()

    def check_unchanged(self, given: Mapping[str, Any], fixed: Mapping[str, str]) -> None:
        """Refuse values that a resumed run may not change (see ``run_folder.check_unchanged``)."""
        if self.checkpoint:
            check_unchanged(vars(self.checkpoint["args"]), given, fixed)

    def restore(
        self,
        progress: Progress,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer | None,
        scheduler: Scheduler,
        scaler: NativeScaler | None,
    ) -> None:
        """Put everything back to where the checkpoint was written (see ``checkpoint.restore``); nothing for a new run.

        Raises:
            UserError: If the checkpoint is another model's, or lies behind the best model of its run.
        """
        if self.path and self.checkpoint:
            restore(self.checkpoint, self.path, task, optimizer, scheduler, scaler)
            if self.continues and self.resume != "auto":  # the newest has no best model after it
                refuse_going_back(self.path, progress.num_epochs)


@dataclass(frozen=True)
class Run:
    """An open run: its folder, its log, its checkpoint saver (None on ranks other than 0), its skipped steps."""

    folder: Path
    log: RunLog
    saver: AtomicCheckpointSaver | None
    skipped: SkippedSteps

    def save_recovery(self, progress: Progress) -> None:
        """Save the state in the middle of an epoch."""
        if self.saver:
            self.saver.save_recovery(progress.num_epochs, progress.num_updates)

    def step_done(self, taken: bool, update: int) -> None:
        """Keep the newest checkpoint as the good one where a step was taken from it; roll back a run that diverged.

        Args:
            taken: See ``StepResult``.
            update: Updates before it.

        Raises:
            UserError: If too many steps in a row were skipped (see ``SkippedSteps``).
        """
        if taken and self.saver:
            self.saver.keep_good()
        try:
            self.skipped.count(taken, update)
        except UserError:
            if self.saver:
                self.saver.roll_back()
            raise

    def stop(self, progress: Progress, signal_number: int) -> NoReturn:
        """Save the state for a resumed run and end this one; all ranks must call this after the same update.

        Raises:
            SystemExit: With status 128 + the signal's number, as a shell has it.
        """
        self.save_recovery(progress)
        if in_process_group():
            dist.barrier()  # a launcher ends all ranks where one has ended
        if self.saver:
            self.log.say(f"{self.folder}: stopped at update {progress.num_updates}; continue with --resume auto")
        raise SystemExit(128 + signal_number)


def find_run(output: str, experiment: str, resume: str, name: str) -> FoundRun:
    """Find a run's folder and read the checkpoint that it goes on from; writes nothing.

    Args:
        output: Folder of runs, '' for output/train.
        experiment: Name of the run, '' for one made of the time and ``name``.
        resume: Checkpoint to resume, 'auto' for the newest of the folder, '' for a new run.
        name: See ``run_folder``.

    Raises:
        UserError: If the folder holds another run, or the checkpoint cannot be read.
    """
    folder = run_folder(output, experiment, resume, name)
    paths = find_checkpoints(resume, folder)
    found = FoundRun(folder, resume, paths, *_load_newest(paths))
    if not found.continues:
        refuse_other_run(folder)
    if resume:
        _logger.info(
            f"{folder} goes on from {found.path}" if found.path else f"{folder} holds nothing to resume: a new run"
        )
    return found


def _load_newest(paths: Sequence[Path]) -> tuple[Path | None, dict[str, Any] | None]:
    """Read the first checkpoint that can be read; a line names each one before it.

    Raises:
        UserError: That of the first, if none can be read.
    """
    errors: list[UserError] = []
    for path in paths:
        try:
            checkpoint = load_training_checkpoint(path)
        except UserError as error:
            errors.append(error)
            continue
        for damaged in errors:
            _logger.warning(escape(f"{damaged}; falling back to {path}"))
        return path, checkpoint
    if errors:
        raise errors[0]
    return None, None


@contextmanager
def open_run(
    found: FoundRun,
    progress: Progress,
    *,
    primary: bool,
    config: Mapping[str, Any],
    sizes: Mapping[str, Any],
    total_updates: int,
    train_columns: Sequence[str],
    eval_columns: Sequence[str],
    wandb_project: str | None,
    log_wandb: bool,
    export: Callable[[dict[str, Any]], None],
    **saved: Any,
) -> Iterator[Run]:
    """Lock a run's folder until the block ends, write args.yaml, and open log and checkpoint saver.

    Args:
        found: What :func:`find_run` returned.
        progress: Where the run stands.
        primary: This process writes; the others log and save nothing.
        config: Flags of the run, for args.yaml.
        sizes: What checkpoints keep beside them for ``check_unchanged``.
        total_updates: Updates of the whole run.
        train_columns: See ``RunLog``.
        eval_columns: See ``RunLog``.
        wandb_project: Project of Weights & Biases.
        log_wandb: Send epochs there.
        export: See ``AtomicCheckpointSaver``.
        **saved: What checkpoints hold: more arguments of timm's ``CheckpointSaver``.

    Raises:
        UserError: If the folder cannot be written, or another process uses it or has done so since.
    """
    if not primary:
        yield Run(
            found.folder, RunLog(None, total_updates, progress.num_updates), None, SkippedSteps(found.folder / LAST)
        )
        return
    with lock_folder(found.folder, found.resume, found.paths):
        write_text(found.folder / ARGS, yaml.safe_dump(dict(config), sort_keys=False))
        args = Namespace(**config, **sizes, run_layout=RUN_LAYOUT)
        saver = AtomicCheckpointSaver(found.folder, export, args=args, **saved)
        if found.checkpoint and found.continues:
            saver.load_state_dict(found.checkpoint["saver"])
            epoch, metric = found.checkpoint["saver"]["pending"]
            if found.path == found.folder / LAST and epoch < progress.num_epochs:  # else the middle of an epoch
                saver.finish_save(epoch, metric)
            read_best(found.folder)  # a damaged one is told now, not after the last epoch
        if not (found.continues and (found.folder / GOOD).exists()):
            saver.keep_first(progress.num_epochs)
        if log_wandb:
            importlib.import_module("wandb").init(project=wandb_project, name=found.folder.name, config=dict(config))
        log = RunLog(
            found.folder,
            total_updates,
            progress.num_updates,
            progress.num_epochs,
            train_columns=train_columns,
            eval_columns=eval_columns,
            log_wandb=log_wandb,
        )
        try:
            yield Run(found.folder, log, saver, SkippedSteps(found.folder / LAST))
        finally:
            log.close()
