"""Published Vim weights: where they are, how their inputs are prepared, and how their names become ours.

The files are whole training states of hustvl/Vim (weights, EMA, optimizer, an argparse.Namespace), read as they are;
torch loads them with ``weights_only`` and the Namespace allowed, as timm does.
"""

import math
import re
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from timm.models import clean_state_dict, generate_default_cfgs
from torch import Tensor

from semivim.layers import resample_pos_embed

_RELEASED_NAMES = {"layers.": "blocks.", "norm_f.": "norm."}
_RELEASED_NAME = re.compile(r"^(layers\.|norm_f\.)")
_HEAD = {"head.weight", "head.bias"}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Any, container: str = "model") -> dict[str, Tensor]:
    """Turn a checkpoint of the released Vim, or of ours, into a state dict for a model.

    Args:
        state_dict: A state dict, possibly headless, or a training state that holds one.
        model: The `Vim` to be loaded; its input size decides the size of the position embedding.
        container: Entry of a training state that holds the weights: ``model`` or ``model_ema``.

    Returns:
        State dict with our names, the position embedding resampled where the patch grids differ.

    Raises:
        ValueError: If a training state lacks ``container``, this holds anything but named floating-point tensors, a
            name belongs to no parameter of ``model``, or the grid of the position embedding cannot be told.
    """
    state_dict = {
        _RELEASED_NAME.sub(lambda found: _RELEASED_NAMES[found.group()], name): value
        for name, value in weights_in(state_dict, container).items()
    }
    check_weights(state_dict, model, _HEAD)
    if "pos_embed" in state_dict:
        state_dict["pos_embed"] = fit_pos_embed(state_dict["pos_embed"], model)
    return state_dict


def weights_in(state_dict: dict[str, Any], container: str) -> dict[str, Tensor]:
    """Give the weights of a checkpoint, names cleared of wrappers' prefixes.

    Args:
        state_dict: A state dict, or a training state that holds one.
        container: Entry of a training state that holds the weights.

    Raises:
        ValueError: If a training state lacks ``container``, or the weights are anything but tensors by name.
    """
    if all(isinstance(value, Tensor) for value in state_dict.values()):
        return named_tensors(state_dict, "checkpoint")
    if container not in state_dict:
        entries = ", ".join(map(str, state_dict))
        raise ValueError(f"training state has the entries {entries}, wanted {container!r} among them")
    return named_tensors(state_dict[container], container)


def check_weights(state_dict: dict[str, Tensor], model: Any, head: set[str]) -> None:
    """Refuse weights in our names that belong to no parameter of a model or are no numbers of it.

    Args:
        state_dict: The weights.
        model: The model to be loaded.
        head: Names of the classifier's weights, which the model may lack.

    Raises:
        ValueError: If a name belongs to no parameter, or a tensor is not of floating point.
    """
    unknown = sorted(set(state_dict) - set(model.state_dict()) - head)
    if unknown:
        raise ValueError(f"checkpoint has {len(unknown)} keys that the model lacks: {', '.join(unknown)}")
    whole = [name for name, value in state_dict.items() if not value.is_floating_point()]
    if whole:
        raise ValueError(f"{whole[0]} is of {state_dict[whole[0]].dtype}, wanted floating point")


def named_tensors(weights: Any, where: str) -> dict[str, Tensor]:
    """Give the tensors of an untrusted state dict, names cleared of wrappers' prefixes.

    Args:
        weights: What should be a state dict.
        where: Its place, named in the error.

    Raises:
        ValueError: If it is anything but a dict of tensors by name.
    """
    if not isinstance(weights, dict):
        raise ValueError(f"{where}: wanted a dict of tensors, got {type(weights).__name__}")
    for name, value in weights.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise ValueError(f"{where}: wanted tensors by name, got {type(value).__name__} under {name!r}")
    return clean_state_dict(weights)


def fit_pos_embed(pos_embed: Tensor, model: Any) -> Tensor:
    """Resample a checkpoint's position embedding to the model's patch grid."""
    if pos_embed.ndim != 3 or pos_embed.shape[1] < 2:
        raise ValueError(f"pos_embed has shape {tuple(pos_embed.shape)}, wanted (1, patches + 1, {model.embed_dim})")
    grid, num_patches = model.patch_embed.grid_size, pos_embed.shape[1] - 1
    source_size = getattr(model, "pretrained_model_args", {}).get("img_size")
    side = math.isqrt(num_patches)
    candidates = [grid, (side, side)]
    if source_size is not None:
        candidates.insert(0, model.patch_embed.dynamic_feat_size(to_2tuple(source_size)))
    for source in candidates:
        if source[0] * source[1] == num_patches:
            return resample_pos_embed(pos_embed, grid, source)
    raise ValueError(f"pos_embed has {num_patches} patch positions, wanted a square number or {grid[0]} x {grid[1]}")


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **kwargs,
    }


def _released(size: str, filename: str, **kwargs: Any) -> dict[str, Any]:
    return _cfg(
        hf_hub_id=f"hustvl/Vim-{size}-midclstok",
        hf_hub_filename=filename,
        license="apache-2.0",
        origin_url="https://github.com/hustvl/Vim",
        paper_name="Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
        paper_ids="arXiv:2401.09417",
        **kwargs,
    )


_TINY, _TINY_FT = "vim_t_midclstok_76p1acc.pth", "vim_t_midclstok_ft_78p3acc.pth"
_SMALL, _SMALL_FT = "vim_s_midclstok_80p5acc.pth", "vim_s_midclstok_ft_81p6acc.pth"
_BASE = "vim_b_midclstok_81p9acc.pth"
_START = {
    "description": "Vim's supervised ImageNet-1k weights, a start for semi-supervised training; not semi-supervised."
}

default_cfgs = generate_default_cfgs(
    {
        "vim_tiny_patch16_224.hustvl_in1k": _released("tiny", _TINY),
        "vim_tiny_patch16_stride8_224.hustvl_ft_in1k": _released("tiny", _TINY_FT),
        "vim_small_patch16_224.hustvl_in1k": _released("small", _SMALL),
        "vim_small_patch16_stride8_224.hustvl_ft_in1k": _released("small", _SMALL_FT),
        "vim_base_patch16_224.hustvl_in1k": _released("base", _BASE),
        "semivim_tiny.vim_in1k": _released("tiny", _TINY, **_START),
        "semivim_small.vim_in1k": _released("small", _SMALL, **_START),
        "semivim_base.vim_in1k": _released("base", _BASE, **_START),
        "dyvm_tiny.untrained": _cfg(),
        "dyvm_small.untrained": _cfg(),
        "dyvm_base.untrained": _cfg(),
        "test_dyvm.untrained": _cfg(input_size=(3, 32, 32), crop_pct=1.0),
        "semivim_pico.untrained": _cfg(input_size=(3, 32, 32), crop_pct=1.0),
        "test_vim.untrained": _cfg(input_size=(3, 32, 32), crop_pct=1.0),
    }
)
# The accuracy published for the base model is its EMA's; tiny and small publish that of the weights.
WEIGHTS_ENTRY = {"vim_base_patch16_224": "model_ema", "semivim_base": "model_ema"}
