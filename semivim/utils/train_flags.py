"""Command line flags shared by the training scripts, in timm's spelling and with timm's defaults.

Left out of timm's list, as nothing here would read them: knowledge distillation, NaFlex and scheduled sizes,
TorchScript and fusers, ``--jsd-loss``/``--aug-splits``/``--split-bn``, the binary cross-entropy family and the
batch-norm group (Vim has no batch norm).
"""

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from timm.utils import ParseKwargs


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and suggest the nearest flag."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line, naming the nearest known flag where one was misspelt."""
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            flags = [option for action in self._actions for option in action.option_strings]
            for word in message.removeprefix(prefix).split():
                near = difflib.get_close_matches(word.split("=")[0], flags, n=1)
                if near:
                    message += f" (did you mean {near[0]}?)"
                    break
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive_int(text: str) -> int:
    """An int of at least 1, or an argparse error that names the value."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


def non_negative_int(text: str) -> int:
    """An int of at least 0, or an argparse error that names the value."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def share(text: str) -> float:
    """A float in [0, 1], or an argparse error that names the value."""
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1]")
    return value


def add_dataset_flags(parser: argparse.ArgumentParser) -> None:
    """Add the group `Dataset parameters`."""
    group = parser.add_argument_group("Dataset parameters")
    group.add_argument("--data-dir", metavar="DIR", help="root folder of the dataset")
    group.add_argument(
        "--dataset", default="", metavar="NAME", help="timm's 'TYPE/NAME', '' for a folder, or 'embedded/digits'"
    )
    group.add_argument("--train-split", default="train", metavar="NAME", help="training split")
    group.add_argument("--val-split", default="validation", metavar="NAME", help="validation split")
    group.add_argument("--dataset-download", action="store_true", help="allow torch/ and hfds/ datasets to download")
    group.add_argument("--class-map", default="", metavar="FILE", help="class name to index mapping file")
    group.add_argument("--input-img-mode", default=None, metavar="MODE", help="PIL mode: RGB, or L for one channel")
    group.add_argument("--input-key", default=None, help="dataset key for images")
    group.add_argument("--target-key", default=None, help="dataset key for labels")
    group.add_argument("--dataset-trust-remote-code", action="store_true", help="let hfds/ datasets run their code")


def add_model_flags(parser: argparse.ArgumentParser, model: str) -> None:
    """Add the group `Model parameters`; ``model`` is the default of ``--model``."""
    group = parser.add_argument_group("Model parameters")
    group.add_argument("--model", default=model, metavar="NAME", help="any timm model name (%(default)s)")
    group.add_argument("--pretrained", action="store_true", help="start from the model's pretrained weights")
    group.add_argument("--pretrained-path", default=None, metavar="FILE", help="load these as the pretrained weights")
    group.add_argument("--initial-checkpoint", default="", metavar="FILE", help="load this checkpoint after creation")
    group.add_argument("--resume", default="", metavar="FILE", help="resume model, optimizer and position from here")
    group.add_argument("--no-resume-opt", action="store_true", help="leave the optimizer's state out when resuming")
    group.add_argument("--num-classes", type=positive_int, default=None, help="number of classes (from the data)")
    group.add_argument("--gp", default=None, metavar="POOL", help="global pool type")
    group.add_argument("--img-size", type=positive_int, default=None, metavar="N", help="image size in pixels")
    group.add_argument("--in-chans", type=positive_int, default=None, metavar="N", help="image channels")
    group.add_argument(
        "--input-size", type=positive_int, nargs=3, default=None, metavar="N", help="channels height width"
    )
    group.add_argument("--crop-pct", type=float, default=None, help="center crop share of the resized image")
    group.add_argument("--mean", type=float, nargs="+", default=None, help="image mean")
    group.add_argument("--std", type=float, nargs="+", default=None, help="image standard deviation")
    group.add_argument("--interpolation", default="", help="resize interpolation")
    group.add_argument("-b", "--batch-size", type=positive_int, default=128, help="(labelled) batch size per device")
    group.add_argument("-vb", "--validation-batch-size", type=positive_int, default=None, help="evaluation batch size")
    group.add_argument("--channels-last", action="store_true", help="channels_last memory layout")
    group.add_argument("--grad-accum-steps", type=positive_int, default=1, help="batches per optimizer step")
    group.add_argument("--grad-checkpointing", action="store_true", help="recompute activations in the backward pass")
    group.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="K=V", help="model options")
    group.add_argument("--torchcompile", nargs="?", default=None, const="inductor", help="torch.compile backend")
    group.add_argument("--torchcompile-mode", default=None, help="torch.compile mode")


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    """Add the group `Device parameters`."""
    group = parser.add_argument_group("Device parameters")
    group.add_argument("--device", default=None, help="device (cuda where there is one, else cpu)")
    group.add_argument("--amp", action="store_true", help="automatic mixed precision; the scan stays in float32")
    group.add_argument("--amp-dtype", default="float16", choices=["float16", "bfloat16"], help="(%(default)s)")
    group.add_argument("--device-modules", default=None, nargs="+", metavar="MODULE", help="modules to import first")


def add_optimizer_flags(parser: argparse.ArgumentParser) -> None:
    """Add the group `Optimizer parameters`."""
    group = parser.add_argument_group("Optimizer parameters")
    group.add_argument("--opt", default="sgd", metavar="NAME", help="optimizer (%(default)s)")
    group.add_argument("--opt-eps", type=float, default=None, help="optimizer epsilon")
    group.add_argument("--opt-betas", type=float, nargs="+", default=None, metavar="BETA", help="optimizer betas")
    group.add_argument("--momentum", type=float, default=0.9, metavar="M", help="momentum (%(default)s)")
    group.add_argument("--weight-decay", type=float, default=2e-5, help="weight decay (%(default)s)")
    group.add_argument("--clip-grad", type=float, default=None, metavar="NORM", help="clip gradients (off)")
    group.add_argument("--clip-mode", default="norm", choices=["norm", "value", "agc"], help="(%(default)s)")
    group.add_argument("--layer-decay", type=float, default=None, help="learning rate decay per layer")
    group.add_argument("--layer-decay-min-scale", type=float, default=0, help="least layer scale")
    group.add_argument(
        "--layer-decay-no-opt-scale", type=float, default=None, help="scale below which a layer is frozen"
    )
    group.add_argument(
        "--opt-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="K=V", help="optimizer options"
    )


def add_schedule_flags(parser: argparse.ArgumentParser) -> None:
    """Add the group `Learning rate schedule parameters`."""
    group = parser.add_argument_group("Learning rate schedule parameters")
    group.add_argument("--sched", default="cosine", metavar="NAME", help="schedule (%(default)s)")
    group.add_argument("--sched-on-updates", action="store_true", help="step the schedule every update")
    group.add_argument("--lr", type=float, default=None, metavar="LR", help="learning rate, overrides --lr-base")
    group.add_argument(
        "--lr-base", type=float, default=0.1, metavar="LR", help="lr = lr_base * global batch / base size"
    )
    group.add_argument("--lr-base-size", type=positive_int, default=256, metavar="N", help="(%(default)s)")
    group.add_argument("--lr-base-scale", default="", choices=["", "linear", "sqrt"], help="scaling (by optimizer)")
    group.add_argument("--lr-noise", type=float, nargs="+", default=None, help="noise on/off epoch shares")
    group.add_argument("--lr-noise-pct", type=float, default=0.67, help="noise limit (%(default)s)")
    group.add_argument("--lr-noise-std", type=float, default=1.0, help="noise std (%(default)s)")
    group.add_argument("--lr-cycle-mul", type=float, default=1.0, help="cycle length multiplier (%(default)s)")
    group.add_argument("--lr-cycle-decay", type=float, default=0.5, help="decay per cycle (%(default)s)")
    group.add_argument("--lr-cycle-limit", type=positive_int, default=1, help="number of cycles (%(default)s)")
    group.add_argument("--lr-k-decay", type=float, default=1.0, help="k-decay for cosine/poly (%(default)s)")
    group.add_argument("--warmup-lr", type=float, default=1e-5, help="start of the warm-up (%(default)s)")
    group.add_argument("--min-lr", type=float, default=0, help="lower bound (%(default)s)")
    group.add_argument("--epochs", type=positive_int, default=300, metavar="N", help="epochs (%(default)s)")
    group.add_argument("--start-epoch", type=non_negative_int, default=None, metavar="N", help="start at this epoch")
    group.add_argument("--decay-milestones", type=int, nargs="+", default=[90, 180, 270], help="multistep epochs")
    group.add_argument("--decay-epochs", type=float, default=90, help="epochs between decays (%(default)s)")
    group.add_argument("--warmup-epochs", type=non_negative_int, default=5, help="(%(default)s)")
    group.add_argument("--warmup-prefix", action="store_true", help="do not count the warm-up in the schedule")
    group.add_argument("--cooldown-epochs", type=non_negative_int, default=0, help="epochs at the lowest rate")
    group.add_argument("--patience-epochs", type=positive_int, default=10, help="plateau patience (%(default)s)")
    group.add_argument("--decay-rate", "--dr", type=float, default=0.1, help="decay rate (%(default)s)")
    group.add_argument("--train-batches-per-epoch", type=positive_int, default=None, help="batches in an epoch")


def add_augmentation_flags(parser: argparse.ArgumentParser) -> None:
    """Add the group `Augmentation and regularization parameters`."""
    group = parser.add_argument_group("Augmentation and regularization parameters (labelled branch)")
    group.add_argument("--no-aug", action="store_true", help="no training augmentation of labelled images")
    group.add_argument("--train-crop-mode", default=None, help="rrc (default), rkrc or rkrr")
    group.add_argument("--scale", type=float, nargs=2, default=[0.08, 1.0], help="crop area range")
    group.add_argument("--ratio", type=float, nargs=2, default=[3 / 4, 4 / 3], help="crop aspect range")
    group.add_argument("--hflip", type=share, default=0.5, help="probability (%(default)s)")
    group.add_argument("--vflip", type=share, default=0.0, help="probability (%(default)s)")
    group.add_argument("--color-jitter", type=float, default=0.4, help="(%(default)s)")
    group.add_argument("--color-jitter-prob", type=share, default=None, help="probability of colour jitter")
    group.add_argument("--grayscale-prob", type=share, default=None, help="probability of grey scale")
    group.add_argument("--gaussian-blur-prob", type=share, default=None, help="probability of blur")
    group.add_argument("--aa", default=None, metavar="NAME", help="auto augment policy, as timm's")
    group.add_argument("--reprob", type=share, default=0.0, help="random erasing probability (%(default)s)")
    group.add_argument("--remode", default="pixel", choices=["const", "rand", "pixel"], help="(%(default)s)")
    group.add_argument("--recount", type=positive_int, default=1, help="random erasing count (%(default)s)")
    group.add_argument("--mixup", type=float, default=0.0, help="mixup alpha (%(default)s)")
    group.add_argument("--cutmix", type=float, default=0.0, help="cutmix alpha (%(default)s)")
    group.add_argument("--cutmix-minmax", type=float, nargs=2, default=None, help="cutmix box range, sets cutmix on")
    group.add_argument("--mixup-prob", type=share, default=1.0, help="(%(default)s)")
    group.add_argument("--mixup-switch-prob", type=share, default=0.5, help="(%(default)s)")
    group.add_argument("--mixup-mode", default="batch", choices=["batch", "pair", "elem"], help="(%(default)s)")
    group.add_argument("--mixup-off-epoch", type=non_negative_int, default=0, help="epoch to stop mixup (0: never)")
    group.add_argument("--smoothing", type=share, default=0.1, help="label smoothing (%(default)s)")
    group.add_argument("--train-interpolation", default="random", help="(%(default)s)")
    group.add_argument("--drop", type=share, default=0.0, help="dropout rate (%(default)s)")
    group.add_argument("--drop-path", type=share, default=None, help="stochastic depth rate")


def add_ema_flags(parser: argparse.ArgumentParser) -> None:
    """Add the group `Model exponential moving average parameters`."""
    group = parser.add_argument_group("Model exponential moving average parameters")
    group.add_argument("--model-ema-decay", type=share, default=0.9998, help="decay (%(default)s)")
    group.add_argument("--model-ema-warmup", action="store_true", help="ramp the decay up")


def add_misc_flags(parser: argparse.ArgumentParser) -> None:
    """Add the group `Miscellaneous parameters`."""
    group = parser.add_argument_group("Miscellaneous parameters")
    group.add_argument("--seed", type=int, default=42, help="(%(default)s)")
    group.add_argument("--log-interval", type=positive_int, default=50, metavar="N", help="updates between log lines")
    group.add_argument("--val-interval", type=positive_int, default=1, metavar="N", help="epochs between evaluations")
    group.add_argument(
        "--recovery-interval",
        type=non_negative_int,
        default=0,
        metavar="N",
        help="updates between recovery checkpoints",
    )
    group.add_argument("--checkpoint-hist", type=positive_int, default=10, metavar="N", help="checkpoints kept")
    group.add_argument("-j", "--workers", type=non_negative_int, default=4, metavar="N", help="loader processes")
    group.add_argument("--pin-mem", action="store_true", help="pin host memory")
    group.add_argument("--output", default="", metavar="DIR", help="output folder (./output/train)")
    group.add_argument("--experiment", default="", metavar="NAME", help="run name under --output")
    group.add_argument("--log-wandb", action="store_true", help="log epochs to Weights & Biases as well")
    group.add_argument("--wandb-project", default=None, metavar="NAME", help="Weights & Biases project")
    group.add_argument(
        "--eval-metric",
        default="top1",
        choices=["top1", "top5", "balanced_acc", "worst_class_recall"],
        help="metric that picks the best checkpoint (%(default)s)",
    )


def scaled_lr(args: argparse.Namespace, global_batch: int) -> float:
    """Learning rate: ``--lr``, or timm's ``--lr-base`` scaled by ``global_batch`` (labelled) images per update."""
    if args.lr is not None:
        return args.lr
    ratio = global_batch / args.lr_base_size
    scale = args.lr_base_scale or ("sqrt" if any(o in args.opt.lower() for o in ("ada", "lamb")) else "linear")
    return args.lr_base * (ratio**0.5 if scale == "sqrt" else ratio)


def parse_flags(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse ``-c FILE.yaml`` first, then the command line, which wins.

    Args:
        parser: The script's parser.
        argv: Words of the command line; None takes ``sys.argv``.

    Returns:
        The namespace, without ``config``.

    Raises:
        SystemExit: With status 2 and one line, for an unreadable file, an unknown key or a bad value.
    """
    parser.add_argument("-c", "--config", metavar="FILE", help="YAML file of defaults, keys as in args.yaml")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("-c", "--config")
    known, _ = first.parse_known_args(argv)
    if known.config:
        parser.set_defaults(**read_config(parser, known.config))
    args = parser.parse_args(argv)
    del args.config
    return args


def read_config(parser: argparse.ArgumentParser, path: str) -> dict[str, Any]:
    """Read a YAML file of flag values and hold each key and value against the parser's flags."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        parser.error(f"--config {path}: {error.strerror}")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"--config {path}: not YAML: {str(error).splitlines()[0]}")
    if not isinstance(values, dict):
        parser.error(f"--config {path}: wanted 'flag: value' lines, got {type(values).__name__}")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    checked = {}
    for key, value in values.items():
        if key not in actions:
            near = difflib.get_close_matches(str(key), actions, n=1)
            parser.error(f"--config {path}: unknown key '{key}'" + (f" (did you mean '{near[0]}'?)" if near else ""))
        checked[key] = _typed(parser, actions[key], value, f"--config {path}: {key}")
    return checked


def _typed(parser: argparse.ArgumentParser, action: argparse.Action, value: Any, where: str) -> Any:
    """Give one YAML value the type that the command line would give it."""
    if value is None:
        return None
    if action.nargs == 0:
        if not isinstance(value, bool):
            parser.error(f"{where}: wanted true or false, got {value!r}")
        return value
    if isinstance(action, ParseKwargs):
        if not isinstance(value, dict):
            parser.error(f"{where}: wanted a mapping, got {value!r}")
        return value
    if action.nargs is not None and action.nargs != "?":
        if not isinstance(value, list) or (isinstance(action.nargs, int) and len(value) != action.nargs):
            parser.error(f"{where}: wanted a list of {action.nargs} values, got {value!r}")
        return [_scalar(parser, action, item, where) for item in value]
    return _scalar(parser, action, value, where)


def _scalar(parser: argparse.ArgumentParser, action: argparse.Action, value: Any, where: str) -> Any:
    if isinstance(value, (dict, list)) or (isinstance(value, bool) and action.type is not None):
        parser.error(f"{where}: wanted one value, got {value!r}")
    if callable(action.type):
        try:
            value = action.type(str(value))
        except (ValueError, argparse.ArgumentTypeError) as error:
            parser.error(f"{where}: {error}")
    if action.choices is not None and value not in action.choices:
        parser.error(f"{where}: {value!r} is not one of {', '.join(map(str, action.choices))}")
    return value
