"""The folder of a run: the names of its files, its lock, and what a run that goes on in it may not change."""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from semivim.utils.terminal import escape
from semivim.utils.user_error import UserError, short

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps a second process out
    fcntl = None  # type: ignore[assignment]

_logger = logging.getLogger(__name__)

ARGS = "args.yaml"  # flags of the run, as a -c file
SUMMARY = "summary.csv"  # a row for each epoch
RECORDS = "metrics.jsonl"  # a line for each interval and evaluation
METRICS = "metrics.json"  # results at the end
CURVES = "curves.png"
WEIGHTS = "model.safetensors"  # the best model, with CONFIG as timm and the Hub name them
CONFIG = "config.json"
PIXELS = "semivim_pixel_rules"  # entry of CONFIG, beside timm's
BEST = "best.json"  # epoch and metrics of the best model
LOCK = ".lock"
CHECKPOINT_SUFFIX = ".pth.tar"  # timm's saver adds it to the names below, checkpoint-EPOCH and recovery-EPOCH-UPDATE
LAST = f"last{CHECKPOINT_SUFFIX}"
GOOD = f"good{CHECKPOINT_SUFFIX}"  # the newest checkpoint from which a step was taken
MODEL_BEST = f"model_best{CHECKPOINT_SUFFIX}"  # timm's copy of the best epoch's checkpoint
RECOVERY = "recovery"
_REMOVABLE = re.compile(rf"(checkpoint-\d+|{RECOVERY}-\d+-\d+){re.escape(CHECKPOINT_SUFFIX)}", re.ASCII)
# of ``atomic_path``, ``save_model``, ``AtomicCheckpointSaver`` and timm's saver
_LEFT_BY_A_KILL = re.compile(
    rf"\..+\.\d+\.tmp|\.model-\w{{8}}|(.+{re.escape(CHECKPOINT_SUFFIX)}\.link)"
    rf"|({RECOVERY}_)?tmp{re.escape(CHECKPOINT_SUFFIX)}",
    re.ASCII,
)


def numbered_checkpoint(folder: Path, name: object) -> Path:
    """Path of a run's numbered checkpoint; the only way to a file whose name comes out of another file.

    Args:
        folder: The run folder.
        name: Should be ``checkpoint-EPOCH.pth.tar`` or ``recovery-EPOCH-UPDATE.pth.tar``, without any folder.

    Raises:
        UserError: If the name is anything else, as a foreign checkpoint may have it.
    """
    if not isinstance(name, str) or not _REMOVABLE.fullmatch(name):
        raise UserError(f"{folder}: wanted the name of a numbered checkpoint, got {name!r}, which is left alone")
    return folder / name


def remove_checkpoint(folder: Path, name: object) -> None:
    """Remove a run's numbered checkpoint if it exists (see :func:`numbered_checkpoint`)."""
    numbered_checkpoint(folder, name).unlink(missing_ok=True)


def run_folder(output: str, experiment: str, resume: str, name: str) -> Path:
    """Folder of a run: OUTPUT/EXPERIMENT, or without a name the folder of the file to resume, else one named by time.

    Args:
        output: Folder of runs, '' for output/train.
        experiment: Name of the run, '' for none.
        resume: File to resume, 'auto' or ''.
        name: Follows the time in the name of a folder that is given none.
    """
    if resume not in ("", "auto") and not experiment:
        return Path(resume).parent
    name = re.sub(r"[^\w.-]+", "-", name)  # hf-hub:org/name is no folder name
    return Path(output or "output/train") / (experiment or f"{time.strftime('%Y%m%d-%H%M%S')}-{name}")


def find_checkpoints(resume: str, folder: Path) -> list[Path]:
    """File to resume, [] to start afresh; 'auto' takes those of the run folder, newest first.

    A recovery file, whose name tells epoch and update, is newer than ``last``: the end of an epoch removes them.
    """
    if resume != "auto":
        return [Path(resume)] if resume else []
    last = folder / LAST
    return [
        *checkpoints_of_kind(folder, RECOVERY),
        *([last] if last.is_file() else []),
        *checkpoints_of_kind(folder, "checkpoint"),
    ]


def checkpoints_of_kind(folder: Path, kind: str) -> list[Path]:
    """Numbered checkpoints of a kind, ``checkpoint`` or ``recovery``, newest first."""
    files = [file for file in folder.glob(f"{kind}-*{CHECKPOINT_SUFFIX}") if _REMOVABLE.fullmatch(file.name)]
    return sorted(files, key=lambda file: [int(n) for n in re.findall(r"\d+", file.name)], reverse=True)


def sweep(folder: Path) -> None:
    """Remove the temporary files that killed runs left in a folder, which must be locked."""
    for file in list(folder.iterdir()):
        if not _LEFT_BY_A_KILL.fullmatch(file.name):
            continue
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink()


def check_unchanged(saved: Mapping[str, Any], given: Mapping[str, Any], fixed: Mapping[str, str]) -> None:
    """Refuse values that a resumed run would ignore, or that would renumber its epochs or images.

    Args:
        saved: Flags and sizes of the run, as its checkpoint holds them.
        given: The same now.
        fixed: Names of those that may not change, with the flags that set them. Paths are the same where they lead to
            the same place, and a list is the same as a tuple.

    Raises:
        UserError: Where one differs; the message names the flag and both values.
    """
    for name, flags in fixed.items():
        try:
            was = _plain(saved.get(name))
        except yaml.YAMLError as error:
            raise UserError(f"{flags} is {short(saved[name])} in the run to resume, no value of a flag") from error
        if was != _plain(given[name]):
            raise UserError(
                f"{flags} is {given[name]}, but {saved.get(name)} in the run to resume, which cannot change it: "
                f"give {saved.get(name)}, or start another run"
            )


def _plain(value: Any) -> Any:
    """A value as args.yaml would give it back, strings as whole paths."""
    plain = yaml.safe_load(yaml.safe_dump(value))
    return os.path.abspath(plain) if isinstance(plain, str) and plain else plain


def refuse_other_run(folder: Path) -> None:
    """Raise UserError where a folder holds checkpoints, which a run that does not continue them would overwrite."""
    files = [file.name for file in folder.glob(f"*{CHECKPOINT_SUFFIX}") if "tmp" not in file.name and file.name != GOOD]
    if files:
        resume = "auto" if find_checkpoints("auto", folder) else folder / max(files)
        raise UserError(f"{folder} holds a run already: add --resume {resume} to go on, or name another --experiment")


def refuse_going_back(path: Path, num_epochs: int) -> None:
    """Raise UserError where a run's best model is of an epoch that its checkpoint has still to train.

    Args:
        path: The checkpoint, in the folder of its run.
        num_epochs: Epochs that it holds.
    """
    best = path.parent / BEST
    if best.is_file() and (epoch := json.loads(best.read_text())["epoch"]) >= num_epochs:
        raise UserError(
            f"--resume {path} goes back behind the best model of its run (epoch {epoch}): "
            "name a new --experiment to branch off from there"
        )


@contextmanager
def lock_folder(folder: Path, resume: str, paths: Sequence[Path]) -> Iterator[None]:
    """Create a run folder and keep other processes out of it until the block, or this process, ends.

    Args:
        folder: The run folder.
        resume: As of :func:`find_checkpoints`.
        paths: What :func:`find_checkpoints` found before.

    Raises:
        UserError: If the folder cannot be written, another process trains in it, or has done so since.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("w")
    except OSError as error:
        raise UserError(f"--output: cannot write to {folder}: {error.strerror}") from error
    with file:
        try:
            # Unlike flock's, this lock is not inherited by loader processes, which outlive a killed run for seconds.
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"{folder} is in use by another process: name another --experiment") from None
        except OSError as error:
            _logger.warning(escape(f"{folder} cannot be locked ({error.strerror}): start no second run in it"))
        if not paths or paths[0].parent.resolve() != folder.resolve():
            refuse_other_run(folder)
        elif find_checkpoints(resume, folder) != paths:
            raise UserError(f"{folder}: another process went on with this run meanwhile: start again")
        sweep(folder)
        yield
