"""Top-k labels of image files, prepared as evaluation prepares them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import get_pretrained_cfg, split_model_name_tag
from torch import nn

from semivim.data import ImageSource, View, open_unlabelled_folder
from semivim.hub.hub_session import fetch, hub_session
from semivim.hub.model_folder import FOLDER, HUB, find_folder, load_folder, pixel_rules
from semivim.models.vim_weights import named_tensors
from semivim.runs.run_folder import WEIGHTS
from semivim.utils.files import load_weights
from semivim.utils.model_options import check_name, check_options, did_you_mean_model
from semivim.utils.pixels import PixelRules
from semivim.utils.preprocessing import resolve_preprocessing
from semivim.utils.user_error import UserError, did_you_mean_file, one_line

# of a training state, the teacher's weights first, as timm takes them
_ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model")


def load_model(
    name: str, pretrained: bool = False, checkpoint: str | None = None, num_classes: int | None = None
) -> nn.Module:
    """Create a model with weights, in eval mode on the CPU.

    Args:
        name: ``hf-hub:org/name[@revision]``, a folder as a training run leaves it, with ``local-dir:`` before it or
            without, or a timm model name.
        pretrained: Load the pretrained weights of a timm model name.
        checkpoint: Load this file into a timm model name; of a training checkpoint the teacher's weights.
        num_classes: Number of classes of ``checkpoint``; the model's own if None.

    Raises:
        UserError: If the name is unknown, has no weights, or the checkpoint does not fit.
        HubError: If the weights cannot be had from the Hub.
    """
    if not timm.is_model(name) and os.path.isdir(name):
        name = f"{FOLDER}{name}"
    if name.startswith((HUB, FOLDER)):
        if checkpoint or pretrained or num_classes:
            unread = "--pretrained, --checkpoint or --num-classes"
            raise UserError(f"--model: {name} has its own weights, wanted no {unread}")
        return load_folder(cast(Path, find_folder(name)), f"--model {name}")
    if not timm.is_model(name):
        hint = did_you_mean_model(name) or did_you_mean_file(name)
        raise UserError(f"--model: wanted a timm model, {HUB}org/name or a run folder, got {name!r}{hint}")
    if pretrained == bool(checkpoint):
        raise UserError(f"--model: {name} needs weights, wanted either --pretrained or --checkpoint")
    if checkpoint:
        return _load_checkpoint(name, checkpoint, num_classes)
    if num_classes:
        raise UserError(f"--num-classes: {num_classes} goes with --checkpoint, wanted none with --pretrained")
    return _load_pretrained(name)


def find_images(paths: Sequence[str]) -> list[str]:
    """Name the image files to label.

    Args:
        paths: Files, and folders that stand for every image below them.

    Raises:
        UserError: If a folder holds no image.
    """
    files = []
    for path in paths:
        if os.path.isdir(path):
            folder = open_unlabelled_folder(path)
            files += [folder.describe(position) for position in range(len(folder))]
        else:
            files.append(path)
    return files


def predict(
    model: nn.Module,
    image_path: str | Path,
    topk: int | None = None,
    rules: PixelRules | None = None,
) -> list[tuple[str, float]]:
    """Most probable classes of an image file, read and prepared by the code that evaluates a training run.

    A camera's note of how to turn the image (EXIF) is not obeyed, as timm does not obey it in training either.

    Args:
        model: A timm model in eval mode.
        image_path: Any image file that Pillow reads.
        topk: Number of classes to return, at most the model's; 5, or all of fewer, if None.
        rules: How pixels become 8 bits; None as in the model's training, where its folder says it.

    Returns:
        ``(label, probability)``, most probable first.

    Raises:
        UserError: If ``topk`` is out of range, or the model has no classes, odd preprocessing or damaged weights.
        UnreadableImageError: If the image is missing or cannot be decoded.
    """
    names = _class_names(model)
    if not names:
        raise UserError("--model: it has 0 classes, wanted a classifier")
    topk = min(5, len(names)) if topk is None else topk
    if not 1 <= topk <= len(names):
        raise UserError(f"--topk: wanted 1 to {len(names)}, got {topk}")
    rules = pixel_rules(model) if rules is None else rules
    source = ImageSource(lambda _: _open_image(image_path), [-1], names=[str(image_path)], rules=rules)
    view = View(**resolve_preprocessing(model, "--model"), is_training=False)
    images = view.load(view([source.image(0)], [0]), torch.device("cpu"))
    with torch.inference_mode():
        logits = model(images)[0].float()
    if not logits.isfinite().all():
        raise UserError(f"--model: its logits of {image_path} are not finite")
    confidence, index = logits.softmax(-1).topk(topk)
    return [(names[i], c) for i, c in zip(index.tolist(), confidence.tolist(), strict=True)]


def _open_image(path: str | Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
    return image


def _load_checkpoint(name: str, checkpoint: str, num_classes: int | None) -> nn.Module:
    state = load_weights(checkpoint)
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    check_options(name, options, f"--num-classes: {num_classes} does not suit {name}")
    model = timm.create_model(name, **options)
    entry = next((entry for entry in _ENTRIES if state.get(entry) is not None), None)
    try:
        weights = named_tensors(state[entry], entry) if entry else named_tensors(state, "state dict")
        model.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--checkpoint: {checkpoint} does not load into {name}: {one_line(error)}") from error
    return model.eval()


def _load_pretrained(name: str) -> nn.Module:
    check_name(name, f"--model: {name}")
    config = get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        known = timm.list_models(f"{split_model_name_tag(name)[0].split('_')[0]}*", pretrained=True)
        hint = f"; with weights: {', '.join(known[:5])}" if known else ""
        raise UserError(f"--model: no pretrained weights exist for {name}{hint}")
    repo_id, _, revision = (config.hf_hub_id or "").partition("@")
    if repo_id:
        # timm finds the file in the cache, where its checksum has been verified
        fetch(repo_id, config.hf_hub_filename or WEIGHTS, revision or None)
    with hub_session(repo_id or name):
        return timm.create_model(name, pretrained=True).eval()


def _class_names(model: nn.Module) -> list[str]:
    """Names from the model's config, else ImageNet's where the number of classes is one of ImageNet's."""
    num_classes, config = cast(int, model.num_classes), cast(dict[str, Any], model.pretrained_cfg)
    names = config.get("label_names")
    names = list(names.values()) if isinstance(names, dict) else names
    if names and len(names) == num_classes:
        descriptions = config.get("label_descriptions") or {}
        return [descriptions.get(name, name) for name in names]
    subset = infer_imagenet_subset(model)
    if subset:
        info = ImageNetInfo(subset)
        return [info.index_to_description(index) for index in range(num_classes)]
    return [f"class {index}" for index in range(num_classes)]
