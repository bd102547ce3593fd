"""Load the model of a folder that holds timm's config and weights, of a run or from the Hub."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import yaml
from safetensors import SafetensorError
from torch import nn

from semivim.runs.run_folder import CONFIG, WEIGHTS
from semivim.utils.files import check_weights_file
from semivim.utils.user_error import UserError, one_line

MODEL_FILES = (CONFIG, WEIGHTS)
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "architecture": str,
    "num_classes": int,
    "label_names": (list, dict),
    "label_descriptions": dict,
    "model_args": dict,
    "pretrained_cfg": dict,
}


def load_folder(folder: Path, where: str) -> nn.Module:
    """Create the model of a folder with its weights, in eval mode on the CPU.

    Args:
        folder: Holds ``config.json`` and ``model.safetensors``.
        where: Name of the folder in the error.

    Raises:
        UserError: If a file is missing or damaged, or the weights do not fit the config.
    """
    lacking = [name for name in MODEL_FILES if not (folder / name).is_file()]
    if lacking:
        raise UserError(f"{where} lacks {', '.join(lacking)}")
    config = read_config(folder, where)
    architecture = config["architecture"]
    if not timm.is_model(architecture):
        raise UserError(f"{where}: {CONFIG}: architecture {architecture!r} is unknown to timm")
    try:
        check_weights_file(folder / WEIGHTS)
        model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except (LookupError, TypeError) as error:  # a bug of the model's, but where the config gives it options
        if not config.get("model_args"):
            raise
        raise UserError(f"{where}: {CONFIG}: model_args do not suit {architecture}: {one_line(error)}") from error
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"{where}: the weights do not load: {one_line(error)}") from error
    # where these differ, timm draws the classifier at random
    if (saved := model.pretrained_cfg["num_classes"]) != model.num_classes:
        raise UserError(f"{where}: {CONFIG}: num_classes is {saved}, but {model.num_classes} in model_args")
    return model


def read_config(folder: Path, where: str) -> dict[str, Any]:
    """Read a folder's ``config.json`` and hold its fields against the types that timm writes.

    Args:
        folder: Holds ``config.json``.
        where: Name of the folder in the error.

    Raises:
        UserError: If it is no JSON, lacks the architecture, or a field has another type.
    """
    config = read_mapping(folder / CONFIG, json.loads, where)
    if "architecture" not in config:
        raise UserError(f"{where}: {CONFIG} lacks architecture")
    for name, wanted in _FIELDS.items():
        if name in config and not isinstance(config[name], wanted):
            raise UserError(f"{where}: {CONFIG}: {name} is {short(config[name])}, wanted {_type_names(wanted)}")
    return config


def read_mapping(path: Path, parse: Callable[[str], Any], where: str) -> dict[str, Any]:
    """Read a JSON or YAML file that holds a mapping.

    Args:
        path: The file.
        parse: ``json.loads`` or ``yaml.safe_load``.
        where: Name of its folder in the error.

    Raises:
        UserError: If it cannot be read or parsed, or holds anything else.
    """
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{where}: {path.name}: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: {path.name}: wanted a mapping, got {type(value).__name__}")
    return value


def short(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _type_names(wanted: type | tuple[type, ...]) -> str:
    return " or ".join(kind.__name__ for kind in (wanted if isinstance(wanted, tuple) else (wanted,)))
