"""Turn a published Vim checkpoint into safetensors and a timm config: ``python -m semivim.convert IN.pth OUT_DIR``.

The folder loads with ``timm.create_model("local-dir:OUT_DIR", pretrained=True)`` and can be uploaded as it is.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError

from semivim.flags.parser import Parser
from semivim.hub.model_folder import load_folder
from semivim.models import Vim
from semivim.models.vim_weights import WEIGHTS_ENTRY, checkpoint_filter_fn
from semivim.runs.checkpoint import save_model
from semivim.utils.files import load_untrusted, one_line


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
        ValueError: If the file cannot be read, its weights do not fit the model, the folder exists or cannot be
            written, or the reloaded model gives other logits.
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        raise ValueError(f"{folder} exists, wanted the name of a folder to create")
    if not folder.parent.is_dir():
        raise ValueError(f"no folder {folder.parent} to create {folder.name} in")
    if model_name not in timm.list_models(module="vim"):
        raise ValueError(f"model is {model_name!r}, wanted one of {', '.join(timm.list_models(module='vim'))}")
    state = load_untrusted(checkpoint)
    if entry and entry not in state:
        raise ValueError(f"entry is {entry!r}, which {checkpoint} lacks")
    try:
        model = _build(model_name, state, entry or WEIGHTS_ENTRY.get(model_name, "model"))
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{checkpoint} does not fit {model_name}: {one_line(error)}") from error
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            staged = Path(temporary) / folder.name
            staged.mkdir()
            save_model(model, staged)
            _compare(model, load_folder(staged, str(folder)))
            staged.rename(folder)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot write {folder}: {one_line(error)}") from error
    return model


def _build(model_name: str, state: dict[str, Any], entry: str) -> Vim:
    weights = checkpoint_filter_fn(state, timm.create_model(model_name, device="meta"), container=entry)
    head = weights.get("head.weight", torch.empty(0, 0))
    if head.ndim != 2:
        raise ValueError(f"head.weight has shape {tuple(head.shape)}, wanted (classes, channels)")
    model: Any = timm.create_model(model_name, num_classes=len(head))
    model.load_state_dict(weights)
    return model.eval()


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
    parser = Parser(prog="python -m semivim.convert", description=__doc__.split("\n")[0])
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
        parser.error(str(error))
    num_params = sum(p.numel() for p in model.parameters())
    sys.stdout.write(
        f"wrote {args.folder}: {args.model}, {num_params} parameters, {model.num_classes} classes; "
        "read again, its logits are bit for bit the same\n"
    )


if __name__ == "__main__":
    main()
