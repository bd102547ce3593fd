"""Turn a published Vim checkpoint into safetensors and a timm config: ``python -m semivim.convert IN.pth OUT_DIR``.

The folder loads with ``timm.create_model("local-dir:OUT_DIR", pretrained=True)`` and can be uploaded as it is.
"""

import argparse
import os
import pickle
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor

from semivim.models import Vim
from semivim.models.vim_weights import WEIGHTS_ENTRY, checkpoint_filter_fn


def convert(checkpoint: str | os.PathLike, model_name: str, folder: str | os.PathLike, entry: str = "") -> Vim:
    """Write ``model.safetensors`` and ``config.json``, reload them and compare logits before they get their name.

    Args:
        checkpoint: File as hustvl/Vim publishes it, a training state or bare weights.
        model_name: Registered name of the architecture, e.g. ``vim_tiny_patch16_224``.
        folder: Folder to create; it must not exist.
        entry: Entry of the training state to take; empty for the one whose accuracy is published.

    Returns:
        The model with the checkpoint's weights.

    Raises:
        ValueError: If the file cannot be read, its weights do not fit the model, the folder exists, or the reloaded
            model gives other logits.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists, wanted the name of a folder to create")
    if not isinstance(timm.create_model(model_name, device="meta") if timm.is_model(model_name) else None, Vim):
        raise ValueError(f"model is {model_name!r}, wanted one of {', '.join(timm.list_models(module='vim'))}")
    state = _read(checkpoint)
    entry = entry or WEIGHTS_ENTRY.get(model_name, "model")
    weights: dict[str, Any] = state if isinstance(state.get("pos_embed"), Tensor) else state.get(entry, {})
    num_classes = weights["head.weight"].shape[0] if "head.weight" in weights else 0
    model: Any = timm.create_model(model_name, num_classes=num_classes).eval()
    try:
        model.load_state_dict(checkpoint_filter_fn(state, model, container=entry))
    except RuntimeError as error:
        raise ValueError(f"{checkpoint} does not fit {model_name}: {error}") from error
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        save_for_hf(model, temporary, safe_serialization=True)
        _compare(model, timm.create_model(f"local-dir:{temporary}", pretrained=True).eval())
        folder.mkdir()
        for file in Path(temporary).iterdir():
            os.replace(file, folder / file.name)
    return model


def _read(checkpoint: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint without running code it may hold; it may hold an argparse.Namespace."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"cannot read {checkpoint}: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{checkpoint} holds a {type(state).__name__}, wanted a dict of weights")
    return state


@torch.no_grad()
def _compare(model: Any, restored: Any) -> None:
    images = torch.randn(2, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
    logits, again = model(images), restored(images)
    if not logits.isfinite().all():
        raise ValueError("the model gives logits that are not finite")
    if not torch.equal(logits, again):
        raise ValueError(f"the reloaded model's logits differ by {(logits - again).abs().max():.2e}, wanted 0")


def main(argv: Sequence[str] | None = None) -> None:
    """Convert one file; any mistake of the user's is one line and status 2.

    Args:
        argv: Words after the module's name; None takes the command line's.
    """
    parser = argparse.ArgumentParser(prog="python -m semivim.convert", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", metavar="IN.pth", help="published checkpoint")
    parser.add_argument("folder", metavar="OUT_DIR", help="folder to create")
    parser.add_argument("--model", required=True, metavar="NAME", help="architecture, e.g. vim_tiny_patch16_224")
    parser.add_argument(
        "--entry",
        default="",
        choices=("model", "model_ema"),
        help="weights to take from a training state; not given: those whose accuracy is published",
    )
    args = parser.parse_args(argv)
    try:
        model = convert(args.checkpoint, args.model, args.folder, args.entry)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    num_params = sum(p.numel() for p in model.parameters())
    sys.stdout.write(
        f"wrote {args.folder}: {args.model}, {num_params} parameters, {model.num_classes} classes; "
        "read again, its logits are bit for bit the same\n"
    )


if __name__ == "__main__":
    main()
