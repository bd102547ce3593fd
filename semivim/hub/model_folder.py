"""Load the model of a folder that holds timm's config and weights, of a run or from the Hub."""

import dataclasses
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from timm.models import PretrainedCfg
from torch import Tensor, nn

from semivim.hub.hub_session import check_repo_id, fetch
from semivim.runs.run_folder import CONFIG, PIXELS, WEIGHTS
from semivim.utils.files import check_weights_file, read_mapping, weights_shapes
from semivim.utils.model_options import (
    MAX_CLASSES,
    NO_WEIGHTS_LIMIT,
    Limit,
    check_numbers,
    check_options,
    did_you_mean_model,
)
from semivim.utils.pixels import PixelRules, usual_rules
from semivim.utils.preprocessing import check_preprocessing, resolve_preprocessing
from semivim.utils.user_error import UserError, did_you_mean_file, one_line, short

HUB, FOLDER = "hf-hub:", "local-dir:"
MODEL_FILES = (CONFIG, WEIGHTS)
_SLACK = Limit(2**24, 100)  # for buffers that a model computes
_NOT_PRETRAINED_CFG = {"architecture", "num_features", "labels"}
_FACTORY_ARGS = inspect.signature(timm.create_model).parameters.keys() - {"kwargs"} | {"features_only"}
# What timm reads of pretrained_cfg to load weights; names may be several.
_LOADING: dict[str, type] = {"num_classes": int, "label_offset": int, "first_conv": str, "classifier": str}
_NUMBERS = ("num_classes", "num_features", "model_args", "pretrained_cfg")
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "architecture": str,
    "num_classes": int,
    "label_names": (list, dict),
    "label_descriptions": dict,
    "model_args": dict,
    "pretrained_cfg": dict,
}


def find_folder(name: str, files: Sequence[str] = MODEL_FILES) -> Path | None:
    """The folder that ``local-dir:FOLDER`` or ``hf-hub:org/name[@revision]`` names, None for any other name.

    Args:
        name: Name of a model.
        files: What to fetch from the Hub, checksums verified.

    Raises:
        UserError: If the repository's name cannot be one.
        HubError: If a file cannot be had from the Hub.
    """
    if name.startswith(FOLDER):
        return Path(name.removeprefix(FOLDER))
    if not name.startswith(HUB):
        return None
    repo_id, _, revision = name.removeprefix(HUB).partition("@")
    check_repo_id(repo_id, HUB.rstrip(":"))
    return [fetch(repo_id, file, revision or None) for file in files][0].parent


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
        raise UserError(f"{where} lacks {', '.join(lacking)}{did_you_mean_file(folder)}")
    try:
        check_weights_file(folder / WEIGHTS)
    except UserError as error:
        raise UserError(f"{where}: the weights do not load: {one_line(error)}") from error
    check_config(folder, where)
    try:
        model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"{where}: the weights do not load: {one_line(error)}") from error
    # where these differ, timm draws the classifier at random
    if (saved := model.pretrained_cfg["num_classes"]) != model.num_classes:
        raise UserError(f"{where}: {CONFIG}: num_classes is {saved}, but {model.num_classes} in model_args")
    if PIXELS in (config := read_config(folder, where)):
        model.pretrained_cfg[PIXELS] = config[PIXELS]
    return model


def pixel_rules(model: nn.Module, what: str = "--model") -> PixelRules:
    """How the model's images became 8 bits in training, as :func:`load_folder` found it; the usual rules otherwise.

    Args:
        model: A model of timm.
        what: What an error calls it.

    Raises:
        UserError: If alpha is kept and the model does not take it, the other way round, or the preprocessing is odd.
    """
    config: Any = model.pretrained_cfg
    channels = resolve_preprocessing(model, what)["input_size"][0]
    usual = usual_rules(channels)
    if PIXELS not in config:
        return usual
    background, max_value = config[PIXELS]["alpha_background"], config[PIXELS]["max_value"]
    if (background is None) != (usual.alpha_background is None):
        does = "keeps" if background is None else "drops"
        raise UserError(f"{what}: {CONFIG} {does} alpha, but the model takes {channels} channels")
    return PixelRules(background and tuple(background), max_value)


def check_config(folder: Path, where: str, options: Mapping[str, Any] | None = None) -> None:
    """Refuse a folder's ``config.json`` whose model cannot be, or is much larger than the weights beside it.

    Args:
        folder: Holds ``config.json``, and ``model.safetensors`` perhaps.
        where: Name of the folder in the error.
        options: More arguments of the model, which take the place of the config's.

    Raises:
        UserError: If the file is damaged, or says what no model or memory can hold.
    """
    config = read_config(folder, where)
    architecture, what = config["architecture"], f"{where}: {CONFIG}"
    if not timm.is_model(architecture):
        raise UserError(f"{what}: architecture {architecture!r} is unknown to timm{did_you_mean_model(architecture)}")
    check_numbers({key: config[key] for key in _NUMBERS if key in config}, MAX_CLASSES, what)
    model_args = config.get("model_args", {})
    if taken := sorted(model_args.keys() & _FACTORY_ARGS):  # with which timm would load other files, or from the Hub
        raise UserError(f"{what}: model_args has {taken[0]}, which no model takes")
    # timm takes the file itself where it lacks the entry
    pretrained_cfg = config.get("pretrained_cfg", {key: config[key] for key in config.keys() - _NOT_PRETRAINED_CFG})
    if unknown := pretrained_cfg.keys() - {field.name for field in dataclasses.fields(PretrainedCfg)}:
        raise UserError(f"{what}: pretrained_cfg has {short(min(unknown))}, which timm does not know")
    check_preprocessing(pretrained_cfg, f"{what}: pretrained_cfg")
    for name, kind in _LOADING.items():
        value = pretrained_cfg.get(name)
        parts = value if kind is str and isinstance(value, list) else [value]
        if value is not None and not all(type(part) is kind for part in parts):
            raise UserError(f"{what}: pretrained_cfg: {name} is {short(value)}, wanted {kind.__name__}")
    limit, shapes = NO_WEIGHTS_LIMIT, dict[str, tuple[int, ...]]()
    if (folder / WEIGHTS).is_file():  # a position embedding may be resampled from a smaller grid
        shapes = weights_shapes(folder / WEIGHTS)
        limit = Limit(4 * sum(map(math.prod, shapes.values())) + _SLACK.elements, 4 * len(shapes) + _SLACK.tensors)
    model = check_options(
        f"{FOLDER}{folder}", options or {}, f"{what} does not suit {architecture}", limit, architecture
    )
    if shapes:
        _check_loading(pretrained_cfg, shapes, model, f"{what}: pretrained_cfg")


def _check_loading(
    pretrained_cfg: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], model: nn.Module, what: str
) -> None:
    """Refuse names by which timm would look for what the model or its weights lack."""
    first, classifier, offset = (pretrained_cfg.get(name) for name in ("first_conv", "classifier", "label_offset"))
    layers = dict(model.named_modules())
    for name in _names(first):
        if f"{name}.weight" in shapes and not isinstance(getattr(layers.get(name), "weight", None), Tensor):
            raise UserError(
                f"{what}: first_conv is {short(first)}, wanted a layer of {type(model).__name__} with weights"
            )
    for name in _names(classifier) if (offset or 0) > 0 else ():  # whose first rows timm cuts off
        for tensor in (f"{name}.weight", f"{name}.bias"):
            if not shapes.get(tensor):
                stated = f"label_offset is {offset} and classifier {short(classifier)}"
                raise UserError(f"{what}: {stated}, but {WEIGHTS} has no rows of {short(tensor)}")


def _names(value: str | Sequence[str] | None) -> Sequence[str]:
    return (value,) if isinstance(value, str) else value or ()


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
    if PIXELS in config and not _are_pixel_rules(config[PIXELS]):
        meant = "alpha_background, three numbers from 0 to 255 or null, and max_value, a number or null"
        raise UserError(f"{where}: {CONFIG}: {PIXELS} is {short(config[PIXELS])}, wanted {meant}")
    return config


def _are_pixel_rules(value: Any) -> bool:
    if not (isinstance(value, dict) and value.keys() == set(PixelRules._fields)):
        return False
    colour, white = value["alpha_background"], value["max_value"]
    is_colour = isinstance(colour, list) and len(colour) == 3 and all(type(c) is int and 0 <= c <= 255 for c in colour)
    return (colour is None or is_colour) and (white is None or (type(white) is int and 0 < white < 2**32))


def _type_names(wanted: type | tuple[type, ...]) -> str:
    return " or ".join(kind.__name__ for kind in (wanted if isinstance(wanted, tuple) else (wanted,)))
