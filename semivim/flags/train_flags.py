"""Command line flags of a training script that no method owns, in timm's spelling and with timm's defaults.

Left out of timm's list, as nothing here would read them: knowledge distillation, NaFlex and scheduled sizes,
TorchScript and fusers, ``--jsd-loss``/``--aug-splits``/``--split-bn``, the binary cross-entropy family, the
batch-norm group (Vim has no batch norm) and ``--input-img-mode`` (the model's channels say it).
"""

import argparse
import importlib.util
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data import create_transform
from timm.optim import list_optimizers
from timm.utils import ParseKwargs

from semivim.flags.parser import COUNT, Name, Number, Parser, assignment

INTERPOLATIONS = ["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]
SCHEDULES = ["cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "plateau"]
COMPILE_MODES = ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]

COUNT_OR_NONE = Number(0, kind=int)
SEED = Number(0, 2**31 - 1, kind=int)
SHARE = Number(0, 1)
SHARE_BELOW_ONE = Number(0, 1, ends="[)")
POSITIVE = Number(0, ends="()")
NON_NEGATIVE = Number(0)


def optimizers() -> list[str]:
    """Names that timm's optimizer factory takes."""
    return [f"{prefix}{name}" for prefix in ("", "lookahead_") for name in list_optimizers()]


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


def augment_policy(text: str) -> str:
    """Type of a flag that holds timm's words for an augmentation, '' for none."""
    # timm passes over words it does not know where they have no digit
    sections = text.split("-")[1:]
    try:
        if not all(re.fullmatch(r"t(weights|3aw?)|(?!t)[a-z]+\d.*", section) for section in sections):
            raise ValueError
        create_transform(32, is_training=True, auto_augment=text)
    except (AssertionError, KeyError, ValueError):
        wanted = "rand-m9-mstd0.5-inc1, augmix-m5-w4-d2, original-mstd0.5, v0, 3a and the like"
        raise argparse.ArgumentTypeError(f"{text} is not an augmentation of timm: {wanted}") from None
    return text


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
    group.add_argument("--input-key", default=None, metavar="KEY", help="dataset key for images")
    group.add_argument("--target-key", default=None, metavar="KEY", help="dataset key for labels")
    group.add_argument("--dataset-trust-remote-code", action="store_true", help="let hfds/ datasets run their code")


def add_model_flags(parser: argparse.ArgumentParser, model: str) -> None:
    """Add the group `Model parameters`; ``model`` is the default of ``--model``."""
    group = parser.add_argument_group("Model parameters")
    group.add_argument("--model", default=model, metavar="NAME", help="any timm model name")
    group.add_argument("--pretrained", action="store_true", help="start from the model's pretrained weights")
    group.add_argument("--pretrained-path", default=None, metavar="FILE", help="what --pretrained loads instead")
    group.add_argument("--initial-checkpoint", default="", metavar="FILE", help="load this checkpoint after creation")
    group.add_argument("--resume", default="", metavar="FILE", help="resume from here; auto: from the run folder")
    group.add_argument("--no-resume-opt", action="store_true", help="leave the optimizer's state out when resuming")
    group.add_argument("--num-classes", type=COUNT, default=None, help="number of classes, else the data's")
    group.add_argument("--gp", default=None, metavar="POOL", help="global pool type, else the model's")
    group.add_argument("--img-size", type=COUNT, default=None, help="image side in pixels, else the model's")
    group.add_argument("--in-chans", type=Number(kind=int), choices=[1, 3], default=None, help="image channels, else 3")
    group.add_argument(
        "--input-size", type=COUNT, nargs=3, default=None, help="channels, height and width in pixels, else the model's"
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
        help="pixel mean of each channel, or one for all, else the model's",
    )
    group.add_argument("--std", type=POSITIVE, nargs="+", default=None, help="standard deviation of pixels, likewise")
    group.add_argument(
        "--interpolation",
        default="",
        choices=["", *INTERPOLATIONS],
        metavar="NAME",
        help=f"evaluation: {', '.join(INTERPOLATIONS)}, else the model's",
    )
    group.add_argument("-b", "--batch-size", type=COUNT, default=128, help="(labelled) images per device and batch")
    group.add_argument(
        "-vb", "--validation-batch-size", type=COUNT, default=None, help="evaluation: images per batch, else -b"
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


def add_device_flags(parser: argparse.ArgumentParser) -> None:
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


def add_optimizer_flags(parser: argparse.ArgumentParser) -> None:
    """Add the group `Optimizer parameters`."""
    group = parser.add_argument_group("Optimizer parameters")
    group.add_argument(
        "--opt",
        type=Name("an optimizer of timm", optimizers),
        default="sgd",
        metavar="NAME",
        help="one of timm's optimizers",
    )
    group.add_argument("--opt-eps", type=NON_NEGATIVE, default=None, help="epsilon, else the optimizer's")
    group.add_argument("--opt-betas", type=SHARE_BELOW_ONE, nargs="+", default=None, help="betas, else the optimizer's")
    group.add_argument("--momentum", type=SHARE_BELOW_ONE, default=0.9, help="momentum, where the optimizer has it")
    group.add_argument("--weight-decay", type=NON_NEGATIVE, default=2e-5, help="weight decay")
    group.add_argument("--clip-grad", type=POSITIVE, default=None, help="largest gradient, as --clip-mode measures it")
    group.add_argument("--clip-mode", default="norm", choices=["norm", "value", "agc"], help="way of clipping")
    group.add_argument(
        "--layer-decay",
        type=Number(0, 1, ends="(]"),
        default=None,
        help="learning rate factor from a layer to the one before",
    )
    group.add_argument("--layer-decay-min-scale", type=SHARE, default=0, help="least factor of a layer")
    group.add_argument(
        "--layer-decay-no-opt-scale", type=SHARE, default=None, help="factor below which a layer is frozen"
    )
    group.add_argument(
        "--opt-kwargs",
        type=assignment,
        nargs="*",
        default={},
        action=ParseKwargs,
        metavar="NAME=VALUE",
        help="optimizer options",
    )


def add_schedule_flags(parser: argparse.ArgumentParser) -> None:
    """Add the group `Learning rate schedule parameters`."""
    group = parser.add_argument_group("Learning rate schedule parameters")
    group.add_argument("--sched", default="cosine", choices=SCHEDULES, metavar="NAME", help=", ".join(SCHEDULES))
    group.add_argument("--sched-on-updates", action="store_true", help="step the schedule every update")
    group.add_argument("--lr", type=NON_NEGATIVE, default=None, help="learning rate, overrides --lr-base")
    group.add_argument(
        "--lr-base", type=NON_NEGATIVE, default=0.1, help="learning rate for a global batch of --lr-base-size"
    )
    group.add_argument("--lr-base-size", type=COUNT, default=256, help="(labelled) images per update")
    group.add_argument(
        "--lr-base-scale",
        default="",
        choices=["", "linear", "sqrt"],
        help="growth with the batch, else sqrt for Adam's kin and lamb, linear for others",
    )
    group.add_argument("--lr-noise", type=SHARE, nargs="+", default=None, help="shares of the run: noise from, to")
    group.add_argument("--lr-noise-pct", type=POSITIVE, default=0.67, help="largest noise, relative to the rate")
    group.add_argument("--lr-noise-std", type=NON_NEGATIVE, default=1.0, help="standard deviation of the noise")
    group.add_argument("--lr-cycle-mul", type=POSITIVE, default=1.0, help="cycle length multiplier")
    group.add_argument("--lr-cycle-decay", type=SHARE, default=0.5, help="rate multiplier per cycle")
    group.add_argument("--lr-cycle-limit", type=COUNT, default=1, help="number of cycles")
    group.add_argument("--lr-k-decay", type=POSITIVE, default=1.0, help="k-decay for cosine and poly")
    group.add_argument("--warmup-lr", type=NON_NEGATIVE, default=1e-5, help="learning rate that the warm-up starts at")
    group.add_argument("--min-lr", type=NON_NEGATIVE, default=0, help="least learning rate")
    group.add_argument("--epochs", type=COUNT, default=300, help="epochs")
    group.add_argument(
        "--start-epoch", type=COUNT_OR_NONE, default=None, help="start at this epoch, else where resumed"
    )
    group.add_argument("--decay-milestones", type=COUNT, nargs="+", default=[90, 180, 270], help="multistep: epochs")
    group.add_argument("--decay-epochs", type=POSITIVE, default=90, help="step, wsd, rsqrt: epochs of a decay")
    group.add_argument("--warmup-epochs", type=COUNT_OR_NONE, default=5, help="epochs of warm-up")
    group.add_argument("--warmup-prefix", action="store_true", help="do not count the warm-up in the schedule")
    group.add_argument("--cooldown-epochs", type=COUNT_OR_NONE, default=0, help="epochs at the lowest rate, at the end")
    group.add_argument("--patience-epochs", type=COUNT, default=10, help="plateau: epochs without progress")
    group.add_argument(
        "--decay-rate", "--dr", type=POSITIVE, default=0.1, help="rate multiplier of a decay; poly: power"
    )
    group.add_argument("--train-batches-per-epoch", type=COUNT, default=None, help="updates in an epoch, else one pass")


def add_augmentation_flags(parser: argparse.ArgumentParser) -> None:
    """Add the group `Augmentation and regularization parameters`."""
    group = parser.add_argument_group("Augmentation and regularization parameters (labelled branch)")
    group.add_argument("--no-aug", action="store_true", help="no training augmentation of labelled images")
    group.add_argument("--train-crop-mode", default=None, choices=["rrc", "rkrc", "rkrr"], help="random crop, else rrc")
    group.add_argument("--scale", type=POSITIVE, nargs=2, default=[0.08, 1.0], help="share of the area: from, to")
    group.add_argument("--ratio", type=POSITIVE, nargs=2, default=[3 / 4, 4 / 3], help="aspect ratio: from, to")
    group.add_argument("--hflip", type=SHARE, default=0.5, help="probability of a horizontal flip")
    group.add_argument("--vflip", type=SHARE, default=0.0, help="probability of a vertical flip")
    group.add_argument("--color-jitter", type=NON_NEGATIVE, default=0.4, help="strength of colour jitter")
    group.add_argument("--color-jitter-prob", type=SHARE, default=None, help="probability of colour jitter, else 1")
    group.add_argument("--grayscale-prob", type=SHARE, default=None, help="probability of grey scale, else 0")
    group.add_argument("--gaussian-blur-prob", type=SHARE, default=None, help="probability of blur, else 0")
    group.add_argument(
        "--aa", type=augment_policy, default=None, metavar="POLICY", help="timm's words, such as rand-m9-mstd0.5-inc1"
    )
    group.add_argument("--reprob", type=SHARE, default=0.0, help="probability of random erasing")
    group.add_argument("--remode", default="pixel", choices=["const", "rand", "pixel"], help="what erasing fills in")
    group.add_argument("--recount", type=COUNT, default=1, help="largest number of erased boxes")
    group.add_argument("--mixup", type=NON_NEGATIVE, default=0.0, help="mixup's alpha, 0 for none")
    group.add_argument("--cutmix", type=NON_NEGATIVE, default=0.0, help="cutmix's alpha, 0 for none")
    group.add_argument(
        "--cutmix-minmax", type=SHARE, nargs=2, default=None, help="cutmix with a side's share: from, to"
    )
    group.add_argument("--mixup-prob", type=SHARE, default=1.0, help="probability of mixup or cutmix")
    group.add_argument("--mixup-switch-prob", type=SHARE, default=0.5, help="probability of cutmix where both are on")
    group.add_argument("--mixup-mode", default="batch", choices=["batch", "pair", "elem"], help="what draws its own")
    group.add_argument("--mixup-off-epoch", type=COUNT_OR_NONE, default=0, help="epoch to stop mixup at, 0 for never")
    group.add_argument("--smoothing", type=SHARE_BELOW_ONE, default=0.1, help="label smoothing")
    group.add_argument(
        "--train-interpolation",
        default="random",
        choices=["random", *INTERPOLATIONS],
        metavar="NAME",
        help=", ".join(["random (bilinear or bicubic)", *INTERPOLATIONS]),
    )
    group.add_argument("--drop", type=SHARE_BELOW_ONE, default=0.0, help="dropout rate")
    group.add_argument(
        "--drop-path", type=SHARE_BELOW_ONE, default=None, help="stochastic depth rate, else the model's"
    )


def add_ema_flags(parser: argparse.ArgumentParser) -> None:
    """Add the group `Model exponential moving average parameters`."""
    group = parser.add_argument_group("Model exponential moving average parameters")
    group.add_argument("--model-ema-decay", type=SHARE, default=0.9998, help="largest decay per update")
    group.add_argument("--model-ema-warmup", action="store_true", help="ramp the decay up")


def add_misc_flags(parser: argparse.ArgumentParser) -> None:
    """Add the group `Miscellaneous parameters`."""
    group = parser.add_argument_group("Miscellaneous parameters")
    group.add_argument("--seed", type=SEED, default=42, help="seed of order, augmentation and initialisation")
    group.add_argument("--log-interval", type=COUNT, default=50, help="updates between log lines")
    group.add_argument("--val-interval", type=COUNT, default=1, help="epochs between evaluations")
    group.add_argument(
        "--recovery-interval", type=COUNT_OR_NONE, default=0, help="updates between recovery checkpoints, 0 for none"
    )
    group.add_argument("--checkpoint-hist", type=COUNT, default=10, help="checkpoints kept")
    group.add_argument("-j", "--workers", type=COUNT_OR_NONE, default=4, help="loader processes per device")
    group.add_argument("--pin-mem", action="store_true", help="pin host memory")
    group.add_argument("--output", default="", metavar="DIR", help="folder of runs, else ./output/train")
    group.add_argument("--experiment", default="", metavar="NAME", help="run name under --output, else time and model")
    group.add_argument("--log-wandb", action="store_true", help="log epochs to Weights & Biases as well")
    group.add_argument("--wandb-project", default=None, metavar="NAME", help="Weights & Biases project")
    group.add_argument(
        "--eval-metric",
        default="top1",
        choices=["top1", "top5", "balanced_acc", "worst_class_recall"],
        help="metric that picks the best checkpoint",
    )


def check_train_flags(parser: Parser, args: argparse.Namespace) -> None:
    """Exit with one line where flags contradict each other, or one is given that nothing would read."""
    for name in ("scale", "ratio", "cutmix_minmax", "lr_noise", "decay_milestones"):
        values, flat = getattr(args, name) or [], name in ("scale", "ratio")
        if not all(a < b or (flat and a == b) for a, b in itertools.pairwise(values)):
            parser.error(f"argument --{name.replace('_', '-')}: wanted rising values, got {_words(values)}")
    if len(args.lr_noise or []) > 2:
        parser.error(f"argument --lr-noise: wanted one or two values, got {_words(args.lr_noise)}")
    if len(args.opt_betas or [0.9, 0.999]) < 2:
        parser.error(f"argument --opt-betas: wanted two values or more, got {_words(args.opt_betas)}")
    channels = args.input_size[0] if args.input_size else args.in_chans or 3
    for name in ("mean", "std"):
        values = getattr(args, name) or [0.0]
        if len(values) not in (1, channels):
            wanted = f"one value for each channel ({channels}), or one for all"
            parser.error(f"argument --{name}: wanted {wanted}, got {_words(values)}")
    if args.input_size and (args.in_chans or channels) != channels:
        parser.error(f"argument --in-chans: got {args.in_chans}, --input-size says {channels}")
    if args.sched == "plateau" and args.sched_on_updates:
        parser.error("argument --sched: plateau steps every epoch, got --sched-on-updates")
    mixes = bool(args.mixup or args.cutmix or args.cutmix_minmax)
    if mixes and args.batch_size % 2:
        parser.error(f"--mixup and --cutmix pair images: --batch-size must be even, got {args.batch_size}")
    _check_device(parser, args)
    owners = {
        "--pretrained": (args.pretrained, "pretrained_path"),
        "--resume": (args.resume, "no_resume_opt"),
        "--torchcompile": (args.torchcompile, "torchcompile_mode"),
        "--amp": (args.amp, "amp_dtype"),
        "--clip-grad": (args.clip_grad, "clip_mode"),
        "--layer-decay": (args.layer_decay, "layer_decay_min_scale layer_decay_no_opt_scale"),
        "--lr-noise": (args.lr_noise, "lr_noise_pct lr_noise_std"),
        "--reprob above 0": (args.reprob, "remode recount"),
        "--mixup or --cutmix": (mixes, "mixup_prob mixup_switch_prob mixup_mode mixup_off_epoch"),
        "--log-wandb": (args.log_wandb, "wandb_project"),
    }
    parser.refuse_unread(args, owners)


def _words(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _check_device(parser: Parser, args: argparse.Namespace) -> None:
    if args.device is None or args.device_modules:  # the modules may bring the device
        return
    try:
        device = torch.device(args.device)
    except RuntimeError:
        parser.error(f"argument --device: {args.device} is not a device of torch, such as cpu, cuda or cuda:1")
    here = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if here and here.type == device.type else 0
    if device.type != "cpu" and (device.index or 0) >= count:
        parser.error(f"argument --device: {args.device} is not here: torch finds {count} devices of type {device.type}")


def scaled_lr(args: argparse.Namespace, global_batch: int) -> float:
    """Learning rate: ``--lr``, or timm's ``--lr-base`` scaled by ``global_batch`` (labelled) images per update."""
    if args.lr is not None:
        return args.lr
    ratio = global_batch / args.lr_base_size
    scale = args.lr_base_scale or ("sqrt" if any(o in args.opt.lower() for o in ("ada", "lamb")) else "linear")
    return args.lr_base * (ratio**0.5 if scale == "sqrt" else ratio)


def parse_flags(
    parser: Parser, argv: Sequence[str] | None = None, defaults: Mapping[str, Any] | None = None
) -> argparse.Namespace:
    """Parse ``defaults``, then ``-c FILE.yaml``, then the command line; what comes later wins.

    Args:
        parser: The script's parser; it gets ``-c``, and what was set becomes the flags' defaults.
        argv: Words of the command line; None takes ``sys.argv``.
        defaults: Values in place of the flags' own defaults.

    Returns:
        The namespace, without ``config``.

    Raises:
        SystemExit: With status 2 and one line, for an unreadable file, an unknown key or a bad value.
    """
    parser.usage = "%(prog)s [-c FILE] [--FLAG VALUE ...]"
    parser.add_argument("-c", "--config", metavar="FILE", help="YAML file of defaults, keys as in a run's args.yaml")
    first = Parser(prog=parser.prog, add_help=False, allow_abbrev=False)
    first.add_argument("-c", "--config")
    known, _ = first.parse_known_args(argv)
    values = parser.checked(defaults or {}, "defaults") | (parser.read_config(known.config) if known.config else {})
    parser.set_defaults(**values)
    args = parser.parse_args(argv)
    del args.config
    return args
