"""Turn a published checkpoint of a model of this package into safetensors and a timm config.

The folder loads with ``timm.create_model("local-dir:OUT_DIR", pretrained=True)`` and can be uploaded as it is.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from torch import nn

from semivim.hub.model_folder import load_folder
from semivim.models import list_models
from semivim.models.vim_weights import WEIGHTS_ENTRY
from semivim.runs.checkpoint import save_model
from semivim.utils.files import load_weights
from semivim.utils.user_error import UserError, did_you_mean, did_you_mean_file, one_line, short


def convert(checkpoint: str | os.PathLike, model_name: str, folder: str | os.PathLike, entry: str = "") -> nn.Module:
    """Write weights and config, reload them and compare logits before they get their name.

    Args:
        checkpoint: File as its authors publish it, a training state or bare weights.
        model_name: Registered name of the architecture, e.g. ``vim_tiny_patch16_224``.
        folder: Folder to create; it must not exist.
        entry: Entry of the training state to take; empty for the one whose accuracy is published.

    Returns:
        The model with the checkpoint's weights.

    Raises:
        UserError: If the file cannot be read, its weights do not fit the model, the folder exists or cannot be
            written, or the reloaded model gives other logits.
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        raise UserError(f"{folder} exists, wanted the name of a folder to create")
    if not folder.parent.is_dir():
        hint = did_you_mean_file(folder.parent)
        raise UserError(f"no folder {folder.parent} to create {folder.name} in{hint}")
    if model_name not in list_models():
        hint = did_you_mean(model_name, list_models())
        raise UserError(f"--model {model_name}: wanted one of {', '.join(list_models())}{hint}")
    state = load_weights(checkpoint)
    if entry and entry not in state:
        raise UserError(f"--entry {entry}: {checkpoint} has none, it holds {', '.join(map(short, list(state)[:5]))}")
    try:
        model = _build(model_name, state, entry or WEIGHTS_ENTRY.get(model_name, "model"))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{checkpoint} does not fit {model_name}: {one_line(error)}") from error
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            staged = Path(temporary) / folder.name
            staged.mkdir()
            save_model(model, staged)
            _compare(model, load_folder(staged, str(folder)), checkpoint)
            staged.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {one_line(error)}") from error
    return model


def _build(model_name: str, state: dict[str, Any], entry: str) -> nn.Module:
    empty: Any = timm.create_model(model_name, device="meta")
    weights = sys.modules[type(empty).__module__].checkpoint_filter_fn(state, empty, container=entry)
    key = f"{empty.pretrained_cfg['classifier']}.weight"
    head = weights.get(key, torch.empty(0, 0))
    if head.ndim != 2:
        raise UserError(f"{key} has shape {tuple(head.shape)}, wanted (classes, channels)")
    model: Any = timm.create_model(model_name, num_classes=len(head))
    model.load_state_dict(weights)
    return model.eval()


@torch.no_grad()
def _compare(model: Any, restored: Any, checkpoint: str | os.PathLike) -> None:
    images = torch.randn(2, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
    logits, again = model(images), restored(images)
    if not logits.isfinite().all():
        raise UserError(f"{checkpoint}: the model gives logits that are not finite")
    if not torch.equal(logits, again):
        raise UserError(f"the reloaded model's logits differ by {(logits - again).abs().max():.2e}, wanted 0")
