"""Flags of the model, its average and the device, in timm's spelling, and what they make."""

import argparse
import importlib
import importlib.util
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

import timm
import torch
from timm.utils import NativeScaler, ParseKwargs, init_distributed_device
from torch.distributed import distributed_c10d

from semivim.flags.data_flags import INTERPOLATIONS
from semivim.flags.parser import COUNT, POSITIVE, SHARE, Name, Number, Parser, assignment, flag, spaced
from semivim.hub.hub_session import hub_session, is_hub_error
from semivim.hub.model_folder import check_config, find_folder
from semivim.runs.run_folder import CONFIG
from semivim.task.tune_scope import TUNE_SCOPES
from semivim.utils.files import check_weights_file
from semivim.utils.model_options import MAX_CLASSES, check_name, check_options
from semivim.utils.preprocessing import CHANNELS, MAX_SIDE_PX, image_channels
from semivim.utils.user_error import UserError, one_line

# The flag that gives a model an argument.
_GIVEN_BY = {
    "drop_path_rate": "--drop-path",
    "drop_rate": "--drop",
    "global_pool": "--gp",
    "in_chans": "--in-chans",
    "img_size": "--img-size",
    "num_classes": "--num-classes",
    "ssmixup_c": "--ssmixup-c",
    "ssmixup_layers": "--ssmixup-layers",
}
# A -c file may come from elsewhere, so what takes memory is bounded.
CLASSES = Number(1, MAX_CLASSES, kind=int)
SIDE_PX = Number(1, MAX_SIDE_PX, kind=int)
BATCH = Number(1, 2**16, kind=int)
COMPILE_MODES = ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


def compile_backends() -> list[str]:
    """Names that ``torch.compile`` takes, those for debugging included."""
    return torch.compiler.list_backends(exclude_tags=())


def importable(text: str) -> str:
    """Type of a flag that names a module; it is found, not imported."""
    try:
        found = importlib.util.find_spec(text)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise argparse.ArgumentTypeError(f"{text} is not a module that can be imported")
    return text


def add_model_flags(parser: Parser, model: str, classifier: bool = True) -> None:
    """Add the group `Model parameters`.

    Args:
        parser: The script's parser.
        model: Default of ``--model``.
        classifier: Whether the model has classes.
    """
    group = parser.add_argument_group("Model parameters")
    group.add_argument("--model", default=model, metavar="NAME", help="any timm model name")
    group.add_argument("--pretrained", action="store_true", help="start from the model's pretrained weights")
    group.add_argument("--pretrained-path", default=None, metavar="FILE", help="what --pretrained loads instead")
    group.add_argument("--initial-checkpoint", default="", metavar="FILE", help="load this checkpoint after creation")
    group.add_argument("--resume", default="", metavar="FILE", help="resume from here; auto: from the run folder")
    group.add_argument("--no-resume-opt", action="store_true", help="leave the optimizer's state out when resuming")
    if classifier:
        group.add_argument("--num-classes", type=CLASSES, default=None, help="number of classes, else the data's")
        group.add_argument("--gp", default=None, metavar="POOL", help="global pool type, else the model's")
        group.add_argument(
            "--tune-scope", default="all", choices=TUNE_SCOPES, help="what trains; ssm: scans, class token and head"
        )
    group.add_argument("--img-size", type=SIDE_PX, default=None, help="image side in pixels, else the model's")
    group.add_argument(
        "--in-chans",
        type=Number(kind=int),
        choices=CHANNELS,
        default=None,
        help="image channels, else 3; the last of 4 is alpha",
    )
    group.add_argument(
        "--input-size",
        type=SIDE_PX,
        nargs=3,
        default=None,
        help="channels, height and width in pixels, else the model's",
    )
    group.add_argument(
        "--crop-pct",
        type=Number(0, 1, ends="(]"),
        default=None,
        help="evaluation: crop over resized side, else the model's",
    )
    group.add_argument(
        "--mean",
        type=SHARE,
        nargs="+",
        default=None,
        help="pixel mean of each channel, or one for all, else the model's (0.5 for alpha)",
    )
    group.add_argument("--std", type=POSITIVE, nargs="+", default=None, help="standard deviation of pixels, likewise")
    group.add_argument(
        "--interpolation",
        default="",
        choices=["", *INTERPOLATIONS],
        metavar="NAME",
        help=f"evaluation: {', '.join(INTERPOLATIONS)}, else the model's",
    )
    group.add_argument("-b", "--batch-size", type=BATCH, default=128, help="(labelled) images per device and batch")
    group.add_argument(
        "-vb", "--validation-batch-size", type=BATCH, default=None, help="evaluation: images per batch, else -b"
    )
    group.add_argument("--channels-last", action="store_true", help="channels_last memory layout")
    group.add_argument("--grad-accum-steps", type=COUNT, default=1, help="batches per optimizer step")
    group.add_argument("--grad-checkpointing", action="store_true", help="recompute activations in the backward pass")
    group.add_argument(
        "--model-kwargs",
        type=assignment,
        nargs="*",
        default={},
        action=ParseKwargs,
        metavar="NAME=VALUE",
        help="model options",
    )
    group.add_argument(
        "--torchcompile",
        type=Name("a backend of torch.compile", compile_backends),
        nargs="?",
        default=None,
        const="inductor",
        metavar="BACKEND",
        help="torch.compile, by inductor if no other is named",
    )
    group.add_argument("--torchcompile-mode", default=None, choices=COMPILE_MODES, help="what it is tuned for")
    parser.checks.append(_check_model)


def _check_model(parser: Parser, args: argparse.Namespace) -> None:
    channels = image_channels(vars(args))
    if channels not in CHANNELS:
        parser.error(f"argument --input-size: wanted 1, 3 or 4 channels, got {channels}")
    for name in ("mean", "std"):
        values = getattr(args, name) or [0.0]
        if len(values) not in (1, channels):
            wanted = f"one value for each channel ({channels}), or one for all"
            parser.error(f"argument --{name}: wanted {wanted}, got {spaced(values)}")
    if args.input_size and (args.in_chans or channels) != channels:
        parser.error(f"argument --in-chans: got {args.in_chans}, --input-size says {channels}")
    conditions = {
        "--pretrained": (args.pretrained, "pretrained_path"),
        "--resume": (args.resume, "no_resume_opt"),
        "--torchcompile": (args.torchcompile, "torchcompile_mode"),
    }
    parser.refuse_unread(args, conditions)


def model_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``timm.create_model`` beside the number of classes and ``--model-kwargs``."""
    img_size = args.img_size or (tuple(args.input_size[1:]) if args.input_size else None)
    return {
        "pretrained": args.pretrained,
        "pretrained_cfg_overlay": {"file": args.pretrained_path} if args.pretrained_path else None,
        "checkpoint_path": args.initial_checkpoint,
        "in_chans": args.in_chans or (args.input_size[0] if args.input_size else None),
        "drop_path_rate": args.drop_path,
        **({"img_size": img_size} if img_size else {}),
    }


def classifier_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``timm.create_model`` that only a model with classes reads, beside their number."""
    return {name: value for name, value in (("global_pool", args.gp), ("drop_rate", args.drop)) if value}


def create_model(args: argparse.Namespace, num_classes: int, **options: Any) -> torch.nn.Module:
    """Create the model that the flags name.

    Args:
        args: The parsed flags.
        num_classes: Number of classes.
        **options: More of the model's arguments, which take the place of ``--model-kwargs``.

    Raises:
        UserError: If the name is unknown, an option does not suit the model, or weights are missing, damaged or another
            model's.
    """
    files = [name for name in ("initial_checkpoint", "pretrained_path") if getattr(args, name)]
    for name in files:
        try:
            check_weights_file(getattr(args, name))
        except UserError as error:
            raise UserError(f"{flag(name)}: {error}") from error
    given = {**model_kwargs(args), "num_classes": num_classes}
    if twice := sorted(args.model_kwargs.keys() & given.keys()):
        raise UserError(f"--model-kwargs {twice[0]}={args.model_kwargs[twice[0]]}: another flag gives the model this")
    given |= args.model_kwargs | options
    weights = {name: given.pop(name) for name in ("pretrained", "pretrained_cfg_overlay", "checkpoint_path")}
    given = {name: value for name, value in given.items() if value is not None}
    with hub_session(args.model, keep_others=True):
        given = _suitable(args, given)
        model = _load(args, files, weights | given)
    if args.grad_checkpointing:
        try:
            model.set_grad_checkpointing(enable=True)
        except (AssertionError, AttributeError) as error:  # as timm's models say that they cannot
            raise UserError(f"--grad-checkpointing: --model {args.model} does not support it") from error
    return model.to(memory_format=torch.channels_last) if args.channels_last else model


def _load(args: argparse.Namespace, files: list[str], given: dict[str, Any]) -> Any:
    """Create the model; weights that do not load are the user's fault, anything else a bug."""
    try:
        return timm.create_model(args.model, **given)
    except (OSError, RuntimeError, ValueError) as error:
        if is_hub_error(error) or not (args.pretrained or files):
            raise
        named = " ".join(f"{flag(name)} {getattr(args, name)}" for name in ("model", *files))
        raise UserError(f"{named}: the weights do not load: {one_line(error)}") from error


def _given_by(name: str, args: argparse.Namespace) -> str:
    """The flag that gave an argument of the model."""
    if name in ("img_size", "in_chans") and args.input_size and not getattr(args, name):
        return "--input-size"
    return _GIVEN_BY.get(name, name)


def _naming_flags(error: UserError, args: argparse.Namespace, what: str) -> UserError:
    """The error about ``what`` with flags in the place of the model's arguments that they gave."""
    cause = str(error).removeprefix(what)
    for name in _GIVEN_BY.keys() - args.model_kwargs.keys():
        cause = re.sub(rf"\b{name}\b", _given_by(name, args), cause)
    return type(error)(f"{what}{cause}")


def _suitable(args: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    """The options that the model takes: without the size of its images where it takes images of any size.

    Raises:
        UserError: If an option does not suit the model, by the flag that gave it.
    """
    what = f"--model {args.model}"
    if folder := find_folder(args.model, [CONFIG]):
        check_config(folder, what)  # alone first, as what fails only below is the fault of the flags
        try:
            check_config(folder, what, options)
        except UserError as error:
            raise _naming_flags(error, args, what) from error
        return options
    check_name(args.model, what)
    named = f"{what} --model-kwargs {args.model_kwargs}" if args.model_kwargs else what
    while True:
        try:
            check_options(args.model, options, named)
            return options
        except UserError as error:
            match = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            name = match[1] if match else ""
            if name not in options or name in args.model_kwargs:
                raise _naming_flags(error, args, named) from error
            if name != "img_size" and options[name]:
                needs_vim = "--pseudo-mixup ss: SSMixup needs a Vim (vim_* or semivim_*)"
                given_by = needs_vim if name == "ssmixup_c" else _given_by(name, args)
                raise UserError(f"{what} does not take {given_by}") from error
            options = {key: value for key, value in options.items() if key != name}


def add_device_flags(parser: Parser) -> None:
    """Add the group `Device parameters`."""
    group = parser.add_argument_group("Device parameters")
    group.add_argument("--device", default=None, metavar="NAME", help="device; cuda where there is one, else cpu")
    group.add_argument("--amp", action="store_true", help="automatic mixed precision; the scan stays in float32")
    group.add_argument("--amp-dtype", default="float16", choices=["float16", "bfloat16"], help="its lower precision")
    group.add_argument(
        "--device-modules",
        type=importable,
        default=None,
        nargs="+",
        metavar="MODULE",
        help="import these first: modules that bring devices or models",
    )
    group.add_argument(
        "--dist-timeout", type=POSITIVE, default=1800.0, help="seconds to wait for a process of the run that hangs"
    )
    parser.checks.append(_check_device)


def _check_device(parser: Parser, args: argparse.Namespace) -> None:
    parser.refuse_unread(args, {"--amp": (args.amp, "amp_dtype")})
    if args.device is None or args.device_modules:  # the modules may bring the device
        return
    try:
        device = torch.device(args.device)
    except RuntimeError:
        parser.error(f"argument --device: {args.device} is not a device of torch, such as cpu, cuda or cuda:1")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if accelerator and accelerator.type == device.type else 0
    if device.type != "cpu" and (device.index or 0) >= count:
        parser.error(f"argument --device: {args.device} is not here: torch finds {count} devices of type {device.type}")


def open_device(args: argparse.Namespace) -> torch.device:
    """Import ``--device-modules``, join the other processes, and write device and ranks into ``args`` as timm does.

    Raises:
        UserError: If the device cannot be used, or the port on which the processes meet is in use.
    """
    for module in args.device_modules or []:
        importlib.import_module(module)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = init_distributed_device(args)
    except torch.distributed.DistNetworkError as error:
        hint = "torchrun --standalone takes a free port"
        raise UserError(f"the processes of the run cannot meet: {one_line(error)}; {hint}") from error
    except (AssertionError, RuntimeError) as error:
        raise UserError(f"--device {args.device}: {one_line(error)}") from error
    if args.distributed:
        # torch 2.11 renamed it
        set_timeout = getattr(torch.distributed, "set_timeout", None) or distributed_c10d._set_pg_timeout
        set_timeout(timedelta(seconds=args.dist_timeout))
    return device


def mixed_precision(
    args: argparse.Namespace, device: torch.device
) -> tuple[Callable[[], AbstractContextManager], NativeScaler | None]:
    """Context of a forward pass, and the scaler of the loss where gradients are float16.

    Raises:
        UserError: For float16 without a GPU.
    """
    dtype = getattr(torch, args.amp_dtype)
    if not args.amp:
        return nullcontext, None
    if device.type == "cpu" and dtype is torch.float16:
        raise UserError("--amp-dtype float16 needs a GPU, whose gradients are scaled: give --amp-dtype bfloat16")
    scaler = NativeScaler() if device.type == "cuda" and dtype is torch.float16 else None
    return partial(torch.autocast, device.type, dtype=dtype), scaler


def add_ema_flags(parser: Parser) -> None:
    """Add the group `Model exponential moving average parameters`."""
    group = parser.add_argument_group("Model exponential moving average parameters")
    group.add_argument("--model-ema-decay", type=SHARE, default=0.9998, help="largest decay per update")
    group.add_argument(
        "--model-ema-warmup",
        action=argparse.BooleanOptionalAction,
        default=True,  # not timm's: an average without it lags behind a short run, whatever the method
        help="ramp the decay up (default, unlike timm)",
    )
