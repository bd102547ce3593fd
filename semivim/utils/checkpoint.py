"""Files a run may not lose: written beside their place, flushed, then renamed over it."""

import json
import os
import shutil
import struct
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from timm.models import save_for_hf
from timm.utils import CheckpointSaver
from torch import nn


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path whose file replaces ``path`` when the block ends, or vanishes if the block raises.

    A reader sees the old file or the whole new one, also after a power cut: file and folder are flushed to disk.
    """
    final = Path(path)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, final)
        _flush(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    if os.name == "nt":  # Windows flushes neither folders nor what is open for reading only
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a whole UTF-8 text file, or leave the old one."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


class AtomicCheckpointSaver(CheckpointSaver):
    """timm's checkpoint saver without the moments in which a kill loses ``last`` or ``model_best``.

    timm unlinks the old file before it renames the new one; here the rename itself replaces it.
    """

    def _replace(self, src: str, dst: str) -> None:
        _flush(Path(src))
        os.replace(src, dst)
        _flush(Path(dst).parent)

    def save_checkpoint(self, epoch: int, metric: float | None = None) -> tuple[float | None, int | None]:
        """Save the end of an epoch; recovery files, now older than ``last``, go."""
        best = super().save_checkpoint(epoch, metric)
        for file in Path(self.recovery_dir).glob(f"{self.recovery_prefix}-*-*{self.extension}"):
            file.unlink(missing_ok=True)
        self.curr_recovery_file = self.last_recovery_file = ""
        return best

    def _duplicate(self, src: str, dst: str) -> None:
        link = f"{dst}.link"
        Path(link).unlink(missing_ok=True)
        try:
            os.link(src, link)
        except OSError:  # a file system without hard links
            shutil.copy2(src, link)
        os.replace(link, dst)


# What torch's restricted unpickler raises for files that are no checkpoints, found by feeding it damaged ones.
UNREADABLE = (
    OSError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError,
    ArithmeticError, struct.error, UnpicklingError,
)  # fmt: skip


def one_line(error: BaseException) -> str:
    """What an exception says, with its type where that is no sentence, in one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return (text if " " in text else f"{type(error).__name__} {text}".strip())[:300]


def load_untrusted(path: str | os.PathLike) -> dict[str, Any]:
    """Read a file of ``torch.save`` without running any code it may hold; an ``argparse.Namespace`` may be inside.

    Args:
        path: The file.

    Returns:
        What it holds, tensors on the CPU.

    Raises:
        ValueError: If the file is missing, damaged, no torch file, or holds anything but a dict; one line names it.
    """
    try:
        with torch.serialization.safe_globals([Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error says it all
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        # torch wraps what it found in the advice to load the file unrestricted
        inner = error.__context__ if isinstance(error, UnpicklingError) else None
        raise ValueError(f"{path} is not a readable torch file: {one_line(inner or error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, wanted a dict of weights or of a training state")
    return content


def load_training_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a file written by :class:`AtomicCheckpointSaver` (see :func:`load_untrusted`).

    Raises:
        ValueError: If the file is missing, truncated, or not a training checkpoint; the message names it.
    """
    if not os.path.isfile(path):
        near = sorted(str(f) for f in Path(path).parent.glob("*.pth.tar"))
        raise ValueError(f"no checkpoint at {path}" + (f"; that folder holds {', '.join(near)}" if near else ""))
    checkpoint = load_untrusted(path)
    if lacking := {"state_dict", "optimizer", "args", "saver"} - checkpoint.keys():
        raise ValueError(f"{path} is not a training checkpoint: it lacks {', '.join(sorted(lacking))}")
    return checkpoint


def save_best(
    model: nn.Module,
    folder: Path,
    label_names: Sequence[str] | None,
    data_config: dict[str, Any],
    metrics: dict[str, Any],
) -> None:
    """Write the best teacher (see :func:`save_model`) and best.json, its epoch and metrics."""
    save_model(model, folder, label_names, data_config)
    write_text(folder / "best.json", json.dumps(metrics))


def save_model(
    model: nn.Module,
    folder: Path,
    label_names: Sequence[str] | None = None,
    data_config: dict[str, Any] | None = None,
) -> None:
    """Write model.safetensors and config.json into a folder, each whole or not at all.

    ``timm.create_model(NAME, checkpoint_path=FOLDER/model.safetensors)`` and ``local-dir:FOLDER`` load them.

    Args:
        model: A model made by timm's registry.
        folder: An existing folder.
        label_names: Names of the classes; left out where their number is not the model's.
        data_config: Preprocessing that the model was evaluated with (timm's ``resolve_input_data_config``); None takes
            the architecture's.
    """
    config = {"label_names": list(label_names)} if label_names and len(label_names) == model.num_classes else None
    with tempfile.TemporaryDirectory(dir=folder, prefix=".model-") as temporary:
        save_for_hf(model, temporary, model_config=config, safe_serialization=True, data_config=data_config)
        shutil.copymode(Path(temporary) / "config.json", Path(temporary) / "model.safetensors")  # readable by others
        for name in ("model.safetensors", "config.json"):
            _flush(Path(temporary) / name)
            os.replace(Path(temporary) / name, folder / name)
