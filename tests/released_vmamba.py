"""Checkpoints in the layouts of VMamba's published files, written apart from what reads them."""

import io
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from semivim.models import VMamba

_STEM = {"conv1": "0", "norm1": "2", "conv2": "5", "norm2": "7"}


def released_weights(model: VMamba) -> dict[str, Tensor]:
    """The model's weights in the names of the release's final layout, a downsampling at the end of its stage."""
    state = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "stem":
            parts = ["patch_embed", _STEM[parts[1]], parts[2]]
        elif parts[0] == "stages" and parts[2] == "downsample":
            layer = {"conv": "1", "norm": "3"}[parts[3]] if hasattr(model.stem, "conv2") else parts[3]
            parts = ["layers", str(int(parts[1]) - 1), "downsample", layer, parts[4]]
        elif parts[0] == "stages":
            parts[0] = "layers"
        elif parts[0] == "norm":
            parts = ["classifier", *parts]
        elif parts[0] == "head":
            parts = ["classifier", "head", parts[2]]
        state[".".join(parts)] = value.clone()
    return state


def single_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names and shapes of the version that is one file, and products stored as convolutions of one pixel."""
    renamed = {}
    vanilla = "patch_embed.5.weight" not in state
    for name, value in state.items():
        if name.endswith(("x_proj_weight", "dt_projs_weight")):
            name, value = name.replace("_weight", ".weight"), value.flatten(0, 1)
        if vanilla:
            name = name.replace("downsample.norm.", "downsample.1.").replace("downsample.reduction.", "downsample.2.")
        elif name.endswith(("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")):
            value = value[:, :, None, None]
        renamed[name] = value
    return renamed


def first_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that the first release's files have."""
    changes = (
        *(("patch_embed.0.", "patch_embed.proj."), ("patch_embed.2.", "patch_embed.norm.")),
        *((".norm.weight", ".ln_1.weight"), (".norm.bias", ".ln_1.bias"), (".op.", ".self_attention.")),
        *(("classifier.ln_1.", "norm."), ("classifier.head.", "head.")),
        ("downsample.ln_1.", "downsample.norm."),
    )
    renamed = {}
    for name, value in state.items():
        for new, old in changes:
            name = name.replace(new, old)
        renamed[name.replace("patch_embed.ln_1.", "patch_embed.norm.")] = value
    return renamed


def detector(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A detector's or segmenter's names: the backbone, a norm for each feature, no classifier, other parts."""
    renamed = {f"backbone.{name}": value for name, value in state.items() if not name.startswith("classifier.")}
    for i in range(4):
        channels = state["classifier.norm.weight"].numel() >> (3 - i)
        for kind in ("weight", "bias"):
            own = state[f"classifier.norm.{kind}"] if i == 3 else torch.full((channels,), float(i))
            renamed[f"backbone.outnorm{i}.{kind}"] = own
    return renamed | {"decode_head.conv_seg.weight": torch.randn(3, 4, 1, 1)}


def training_state(weights: dict[str, Tensor]) -> dict[str, Any]:
    """A file of the release: weights, another average that is not read, optimizer, and a configuration of yacs."""
    other = {name: value + 1 for name, value in weights.items()}
    model: dict[str, Any] = {"model": weights, "model_ema": other, "optimizer": {"state": {}, "param_groups": [{}]}}
    config = Configuration({"MODEL": Configuration({"TYPE": "vssm", "VSSM": Configuration({"DIMS": [96, 192]})})})
    return model | {"lr_scheduler": {}, "max_accuracy": 82.6, "scaler": {}, "epoch": 264, "config": config}


class Configuration(dict):
    """As yacs writes its CfgNode: a dict whose instances have attributes of their own."""

    def __init__(self, entries: dict) -> None:
        super().__init__(entries)
        self.__dict__.update(__immutable__=True, __deprecated_keys__=set(), __renamed_keys__={}, __new_allowed__=False)


Configuration.__module__, Configuration.__qualname__, Configuration.__name__ = "yacs.config", "CfgNode", "CfgNode"


def as_bytes(state: dict[str, Any]) -> bytes:
    """The file that torch.save writes, where yacs is not installed too."""
    package, module = ModuleType("yacs"), ModuleType("yacs.config")
    module.CfgNode = Configuration  # type: ignore[attr-defined]
    before = {name: sys.modules.get(name) for name in ("yacs", "yacs.config")}
    sys.modules.update({"yacs": package, "yacs.config": module})
    try:
        buffer = io.BytesIO()
        torch.save(state, buffer)
    finally:
        for name, old in before.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old
    return buffer.getvalue()
