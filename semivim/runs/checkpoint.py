"""Checkpoints of a run and its best model, written so that a kill at any moment leaves whole files."""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.models import save_for_hf
from timm.utils import CheckpointSaver
from torch import nn

from semivim.utils.files import flush, load_untrusted, write_text


class AtomicCheckpointSaver(CheckpointSaver):
    """timm's checkpoint saver without the moments in which a kill loses ``last`` or ``model_best``.

    timm unlinks the old file before it renames the new one; here the rename itself replaces it.
    """

    def _replace(self, src: str, dst: str) -> None:
        flush(Path(src))
        os.replace(src, dst)
        flush(Path(dst).parent)

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
            flush(Path(temporary) / name)
            os.replace(Path(temporary) / name, folder / name)
