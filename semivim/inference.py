"""Top-k labels of an image file."""

import difflib
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import timm
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_input_data_config
from timm.models import get_pretrained_cfg, split_model_name_tag
from torch import nn

from semivim.utils.hub_session import fetch, hub_session

_HUB = "hf-hub:"
_FOLDER = "local-dir:"
# what torch's restricted unpickler raises for files that are no checkpoints, beside what loading one raises
_UNREADABLE = (RuntimeError, OSError, LookupError, EOFError, ValueError, TypeError, UnpicklingError, SafetensorError)


def load_model(
    name: str, pretrained: bool = False, checkpoint: str | None = None, num_classes: int | None = None
) -> nn.Module:
    """Create a model with weights, in eval mode on the CPU.

    Args:
        name: ``hf-hub:org/name[@revision]``, ``local-dir:FOLDER`` (as a training run leaves it), or a timm model name.
        pretrained: Load the pretrained weights of a timm model name.
        checkpoint: Load this file into a timm model name; of a training checkpoint the teacher's weights.
        num_classes: Number of classes of ``checkpoint``; the model's own if None.

    Raises:
        ValueError: If the name is unknown, has no weights, or the checkpoint does not fit.
        HubError: If the weights cannot be had from the Hub.
    """
    if name.startswith((_HUB, _FOLDER)):
        if checkpoint or pretrained or num_classes:
            raise ValueError(f"model: {name} has its own weights, wanted no pretrained, checkpoint or num_classes")
        return _load_folder(_download(name.removeprefix(_HUB)) if name.startswith(_HUB) else Path(name[len(_FOLDER) :]))
    if not timm.is_model(name):
        near = difflib.get_close_matches(split_model_name_tag(name)[0], timm.list_models(), n=3)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ValueError(f"model: wanted a timm model, {_HUB}org/name or {_FOLDER}FOLDER, got {name!r}{hint}")
    if pretrained == bool(checkpoint):
        raise ValueError(f"model: {name} needs weights, wanted either pretrained or a checkpoint")
    if checkpoint:
        return _load_checkpoint(name, checkpoint, num_classes)
    if num_classes:
        raise ValueError(f"num_classes: {num_classes} goes with a checkpoint, wanted none with pretrained weights")
    return _load_pretrained(name)


def predict(model: nn.Module, image_path: str | Path, topk: int = 5) -> list[tuple[str, float]]:
    """Most probable classes of an image file.

    Args:
        model: A timm model in eval mode.
        image_path: Any image file that Pillow reads.
        topk: Number of classes to return, at most the model's.

    Returns:
        ``(label, probability)``, most probable first.

    Raises:
        ValueError: If the image is missing or unreadable, or ``topk`` is out of range.
    """
    names = _class_names(model)
    if not 1 <= topk <= len(names):
        raise ValueError(f"topk: wanted 1 to {len(names)}, got {topk}")
    config = resolve_input_data_config(model)
    transform = create_transform(**config)
    image = transform(_read_image(Path(image_path), "L" if config["input_size"][0] == 1 else "RGB"))
    with torch.inference_mode():
        confidence, index = model(image.unsqueeze(0)).float().softmax(-1)[0].topk(topk)
    return [(names[i], c) for i, c in zip(index.tolist(), confidence.tolist(), strict=True)]


def _read_image(path: Path, mode: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert(mode)
    except FileNotFoundError as error:
        raise ValueError(f"image: no such file: {path}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow reports a broken PNG chunk as SyntaxError
        raise ValueError(f"image: cannot read {path}: {' '.join(str(error).split())}") from error


def _download(repo: str) -> Path:
    """Fetch a repository's config and weights, checksums verified, and return the folder that holds them."""
    repo_id, _, revision = repo.partition("@")
    if repo_id.count("/") != 1:
        raise ValueError(f"model: wanted {_HUB}org/name[@revision], got {_HUB}{repo}")
    for name in ("config.json", "model.safetensors"):
        path = fetch(repo_id, name, revision or None)
    return path.parent


def _load_folder(folder: Path) -> nn.Module:
    lacking = [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]
    if lacking:
        raise ValueError(f"model: folder {folder} lacks {', '.join(lacking)}")
    try:
        return timm.create_model(f"{_FOLDER}{folder}", pretrained=True).eval()
    except (RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"model: {folder} does not load: {_one_line(error)}") from error


def _load_checkpoint(name: str, checkpoint: str, num_classes: int | None) -> nn.Module:
    if not Path(checkpoint).is_file():
        raise ValueError(f"checkpoint: no such file: {checkpoint}")
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    try:
        return timm.create_model(name, checkpoint_path=checkpoint, **options).eval()
    except _UNREADABLE as error:
        raise ValueError(f"checkpoint: {checkpoint} does not load into {name}: {_one_line(error)}") from error


def _load_pretrained(name: str) -> nn.Module:
    config = get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        known = timm.list_models(f"{split_model_name_tag(name)[0].split('_')[0]}*", pretrained=True)
        hint = f"; with weights: {', '.join(known[:5])}" if known else ""
        raise ValueError(f"model: no pretrained weights exist for {name}{hint}")
    repo_id, _, revision = (config.hf_hub_id or "").partition("@")
    if repo_id:
        # timm finds the file in the cache, where its checksum has been verified
        fetch(repo_id, config.hf_hub_filename or "model.safetensors", revision or None)
    with hub_session(repo_id or name):
        return timm.create_model(name, pretrained=True).eval()


def _class_names(model: nn.Module) -> list[str]:
    """Names from the model's config, else ImageNet's where the number of classes is one of ImageNet's."""
    num_classes, config = cast(int, model.num_classes), cast(dict[str, Any], model.pretrained_cfg)
    names = config.get("label_names")
    if names and len(names) == num_classes:
        descriptions = config.get("label_descriptions") or {}
        return [descriptions.get(name, name) for name in names]
    subset = infer_imagenet_subset(model)
    if subset:
        info = ImageNetInfo(subset)
        return [info.index_to_description(index) for index in range(num_classes)]
    return [f"class {index}" for index in range(num_classes)]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
