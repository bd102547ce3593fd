"""Published VMamba weights: where they are, how their inputs are prepared, and how their names become ours.

The files are training states, release assets of MzeroMiko/VMamba, read from their address as they are. The entry
``model`` holds the weights whose accuracy is published; beside it may stand a configuration of the package yacs, which
is read as a dict, without that package.
"""

import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs
from torch import Tensor

from semivim.layers.cross_scan import DIRECTIONS
from semivim.models.vim_weights import check_weights, weights_in

_RELEASE = "https://github.com/MzeroMiko/VMamba/releases/download"
_HEAD = {"head.fc.weight", "head.fc.bias"}
# Patterns of released names and what takes the place of each, applied one after the other.
_RENAMED = [
    # Older names of the first release.
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"^head\.(weight|bias)$", r"classifier.head.\1"),
    # The single-file version.
    (r"\.(x_proj|dt_projs)\.weight$", r".\1_weight"),
    # All of them.
    (r"^(classifier\.norm|outnorm3)\.", "norm."),
    (r"^classifier\.head\.", "head.fc."),
    (r"^patch_embed\.0\.", "stem.conv1."),
    (r"^patch_embed\.2\.", "stem.norm1."),
    (r"^patch_embed\.5\.", "stem.conv2."),
    (r"^patch_embed\.7\.", "stem.norm2."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
]


@contextmanager
def released_files() -> Iterator[None]:
    """Let torch's restricted unpickler read the configuration of yacs that the files may hold, as a dict."""
    with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
        yield


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Any, container: str = "model") -> dict[str, Tensor]:
    """Turn a checkpoint of a released VMamba, of a detector or segmenter built on one, or of ours, into a state dict.

    Args:
        state_dict: A state dict, possibly headless, or a training state that holds one.
        model: The `VMamba` to be loaded.
        container: Entry of a training state that holds the weights; a detector's is ``state_dict``.

    Returns:
        State dict with our names and shapes. Of a detector only the backbone remains: its norms of the first three
        features have no place here, the last one's becomes the final norm.

    Raises:
        ValueError: If a training state lacks ``container``, this holds anything but named floating-point tensors, or a
            name belongs to no parameter of ``model``.
    """
    if container not in state_dict and "state_dict" in state_dict:
        container = "state_dict"
    weights = weights_in(state_dict, container)
    if any(name.startswith("backbone.") for name in weights):
        weights = {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}
        weights = {k: v for k, v in weights.items() if not k.startswith(("outnorm0.", "outnorm1.", "outnorm2."))}
    vanilla = not hasattr(model.stem, "conv2")
    weights = {_our_name(name, vanilla): _our_shape(name, value) for name, value in weights.items()}
    check_weights(weights, model, _HEAD)
    return weights


def _our_name(name: str, vanilla: bool) -> str:
    for pattern, ours in _RENAMED:
        name = re.sub(pattern, ours, name)
    found = re.match(r"^layers\.(\d+)\.downsample\.(.*)$", name)
    if found is None:
        return name
    # Released, it ends its stage; here it begins the next.
    layer, _, end = found[2].partition(".")
    layers = {"1": "norm", "2": "reduction"} if vanilla else {"1": "conv", "3": "norm"}
    return f"stages.{int(found[1]) + 1}.downsample.{layers.get(layer, layer)}.{end}"


def _our_shape(name: str, value: Tensor) -> Tensor:
    """Unfold the single-file version's products of all directions, fold convolutions of one pixel into matrices."""
    if name.endswith((".x_proj.weight", ".dt_projs.weight")):
        return value.unflatten(0, (DIRECTIONS, -1))
    if value.shape[2:] == (1, 1):
        return value.flatten(1)
    return value


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
        **kwargs,
    }


def _released(asset: str) -> dict[str, Any]:
    return _cfg(
        url=f"{_RELEASE}/{asset}.pth",
        license="mit",
        origin_url="https://github.com/MzeroMiko/VMamba",
        paper_name="VMamba: Visual State Space Model",
        paper_ids="arXiv:2401.10166",
    )


default_cfgs = generate_default_cfgs(
    {
        "vmamba_tiny_s2l5.mzeromiko_in1k": _released("%23v2cls/vssm_tiny_0230_ckpt_epoch_262"),
        "vmamba_small_s2l15.mzeromiko_in1k": _released("%23v2cls/vssm_small_0229_ckpt_epoch_222"),
        "vmamba_base_s2l15.mzeromiko_in1k": _released("%23v2cls/vssm_base_0229_ckpt_epoch_237"),
        "vmamba_tiny_s1l8.mzeromiko_in1k": _released("%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264"),
        "vmamba_small_s1l20.mzeromiko_in1k": _released("%23v2cls/vssm1_small_0229s_ckpt_epoch_240"),
        "vmamba_base_s1l20.mzeromiko_in1k": _released("%23v2cls/vssm1_base_0229s_ckpt_epoch_225"),
        "vanilla_vmamba_tiny.mzeromiko_in1k": _released("%23v0cls/vssmtiny_dp01_ckpt_epoch_292"),
        "vanilla_vmamba_small.mzeromiko_in1k": _released("%23v0cls/vssmsmall_dp03_ckpt_epoch_238"),
        "vanilla_vmamba_base.mzeromiko_in1k": _released("%23v0cls/vssmbase_dp06_ckpt_epoch_241"),
        "test_vmamba.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=1.0),
    }
)
