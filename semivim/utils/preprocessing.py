"""How a model's images are prepared, held against what a view can draw: a config from elsewhere may say anything."""

from collections.abc import Callable, Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_input_data_config
from timm.data.transforms import str_to_interp_mode
from torch import nn

from semivim.utils.user_error import UserError, short

MAX_SIDE_PX = 8192  # of a model's input, and of the image that it is cut out of
CHANNELS = (1, 3, 4)  # grey; red, green and blue; and alpha
_ALPHA_SHARE = 0.5  # mean and standard deviation of alpha where a config states those of the colours only
_CROP_MODES = ("center", "squash", "border")


def image_channels(args: Mapping[str, Any]) -> int:
    """Channels of the images that the flags ask for."""
    size = args.get("input_size")
    return int(size[0] if size else args.get("in_chans") or 3)


def resolve_preprocessing(model: nn.Module, what: str, args: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What timm's ``resolve_input_data_config`` gives, with a mean and standard deviation of alpha.

    Args:
        model: A model of timm.
        what: What an error calls it.
        args: Flags that take the place of what the model's config says.

    Raises:
        UserError: If the config cannot be meant, an image would have sides over ``MAX_SIDE_PX`` or other than 1, 3 or 4
            channels, or it takes 4 and the flags, which decide how images are read, do not say so.
    """
    config: Any = model.pretrained_cfg
    check_preprocessing(config, what)
    given = dict(args or {})
    if image_channels(given) == 4:
        for name, usual in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
            stated = given.get(name) or config.get(name) or usual
            given[name] = (*stated, _ALPHA_SHARE) if len(stated) == 3 else stated
    found = resolve_input_data_config(model, given)
    channels, *sides = found["input_size"]
    if channels not in CHANNELS:
        raise UserError(f"{what}: it takes images of {channels} channels, wanted 1, 3 or 4")
    if args is not None and channels == 4 and image_channels(args) != 4:
        raise UserError(f"{what}: it takes images of 4 channels, wanted --in-chans 4 too")
    side = max(sides) / found["crop_pct"]
    if side > MAX_SIDE_PX:
        raise UserError(
            f"{what}: images would have a side of {side:.0f} pixels (input_size over crop_pct), wanted at most "
            f"{MAX_SIDE_PX}"
        )
    return found


def check_preprocessing(config: Mapping[str, Any], what: str) -> None:
    """Refuse values of a ``pretrained_cfg`` that no image can be prepared by.

    Raises:
        UserError: Naming the field, its value and what is wanted.
    """
    size: Any = config.get("input_size")
    # Statistics of colours may serve other channels too: grey takes their mean, and alpha comes with its own.
    lengths = {1, 3, size[0] if _is_size(size) else 3}
    fields: dict[str, tuple[Callable[[Any], bool], str]] = {
        "input_size": (_is_size, f"channels, height and width, at most {MAX_SIDE_PX} pixels"),
        "mean": (lambda v: _are_shares(v, lengths), "numbers in [0, 1], one for each channel"),
        "std": (
            lambda value: _are_shares(value, lengths) and 0 not in value,
            "numbers in (0, 1], one for each channel",
        ),
        "interpolation": (_is_interpolation, "a name such as bicubic"),
        "crop_pct": (lambda value: _is_number(value) and 0 < value <= 2, "a number in (0, 2]"),
        "crop_mode": (lambda value: value in _CROP_MODES, f"one of {', '.join(_CROP_MODES)}"),
    }
    for name, (fits, wanted) in fields.items():
        if config.get(name) is not None and not fits(config[name]):
            raise UserError(f"{what}: {name} is {short(config[name])}, wanted {wanted}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    if not (isinstance(value, list | tuple) and len(value) == 3):
        return False
    return all(type(part) is int and 1 <= part <= MAX_SIDE_PX for part in value)


def _are_shares(value: Any, lengths: set[int]) -> bool:
    if not (isinstance(value, list | tuple) and len(value) in lengths):
        return False
    return all(_is_number(part) and 0 <= part <= 1 for part in value)


def _is_interpolation(value: Any) -> bool:
    try:
        str_to_interp_mode(value)
    except (KeyError, TypeError):
        return False
    return True
