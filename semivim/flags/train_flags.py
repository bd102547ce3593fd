"""Flags of optimizer, schedule and run that every training script shares, with timm's spelling and defaults.

Left out of timm's list, as nothing here would read them: knowledge distillation, NaFlex and scheduled sizes,
TorchScript and fusers, ``--jsd-loss``/``--aug-splits``/``--split-bn``, the binary cross-entropy family, the
batch-norm group (Vim has no batch norm) and ``--input-img-mode`` (the model's channels say it).
"""

import argparse
import importlib.util
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from timm.utils import ParseKwargs

from semivim.flags.parser import (
    COUNT,
    COUNT_OR_NONE,
    NON_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
    SHARE_BELOW_ONE,
    Name,
    Number,
    Parser,
    assignment,
    spaced,
)
from semivim.utils.user_error import UserError, one_line

# Options of the optimizer, which come with its state: a resumed run would ignore other values.
OPTIMIZER_OPTIONS = (
    "opt", "opt_eps", "opt_betas", "opt_kwargs", "momentum", "weight_decay",
    "layer_decay", "layer_decay_min_scale", "layer_decay_no_opt_scale",
)  # fmt: skip
SCHEDULES = ["cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "plateau"]


def optimizers() -> list[str]:
    """Names that timm's optimizer factory takes."""
    return [f"{prefix}{name}" for prefix in ("", "lookahead_") for name in list_optimizers()]


def add_optimizer_flags(parser: Parser) -> None:
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
    parser.checks.append(_check_optimizer)


def _check_optimizer(parser: Parser, args: argparse.Namespace) -> None:
    if len(args.opt_betas or [0.9, 0.999]) < 2:
        parser.error(f"argument --opt-betas: wanted two values or more, got {spaced(args.opt_betas)}")
    conditions = {
        "--clip-grad": (args.clip_grad, "clip_mode"),
        "--layer-decay": (args.layer_decay, "layer_decay_min_scale layer_decay_no_opt_scale"),
    }
    parser.refuse_unread(args, conditions)


def clip_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """How gradients are clipped, as ``optimizer_step`` takes it."""
    return {"clip_grad": args.clip_grad, "clip_mode": args.clip_mode}


def add_schedule_flags(parser: Parser) -> None:
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
    parser.checks.append(_check_schedule)


def _check_schedule(parser: Parser, args: argparse.Namespace) -> None:
    parser.refuse_falling(args, "lr_noise decay_milestones")
    if len(args.lr_noise or []) > 2:
        parser.error(f"argument --lr-noise: wanted one or two values, got {spaced(args.lr_noise)}")
    if args.sched == "plateau" and args.sched_on_updates:
        parser.error("argument --sched: plateau steps every epoch, got --sched-on-updates")
    parser.refuse_unread(args, {"--lr-noise": (args.lr_noise, "lr_noise_pct lr_noise_std")})


def scaled_lr(args: argparse.Namespace, global_batch: int) -> float:
    """Learning rate: ``--lr``, or timm's ``--lr-base`` scaled by ``global_batch`` (labelled) images per update."""
    if args.lr is not None:
        return args.lr
    ratio = global_batch / args.lr_base_size
    scale = args.lr_base_scale or ("sqrt" if any(o in args.opt.lower() for o in ("ada", "lamb")) else "linear")
    return args.lr_base * (ratio**0.5 if scale == "sqrt" else ratio)


def create_optimizer(
    args: argparse.Namespace,
    model: torch.nn.Module,
    epoch_updates: int,
    images_per_update: int,
    decreasing_metric: bool = False,
) -> tuple[torch.optim.Optimizer, Scheduler, int]:
    """Optimizer, schedule of its learning rate, and the epochs of that schedule; writes the rate into ``args.lr``.

    Args:
        args: The parsed flags.
        model: What is optimised.
        epoch_updates: Updates of an epoch.
        images_per_update: (Labelled) images of an update, over all processes.
        decreasing_metric: Whether the metric that plateau watches falls as the model gets better.

    Raises:
        UserError: If an option does not suit the optimizer or the schedule.
    """
    args.lr = scaled_lr(args, images_per_update)
    try:
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
        schedule = scheduler_kwargs(args, decreasing_metric)
        scheduler, epochs = create_scheduler_v2(optimizer, **schedule, updates_per_epoch=epoch_updates)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"--opt {args.opt}, --opt-kwargs, --sched {args.sched}: {one_line(error)}") from error
    if args.start_epoch is not None and args.start_epoch >= epochs:
        raise UserError(f"--start-epoch is {args.start_epoch}, wanted less than the {epochs} epochs of the schedule")
    return optimizer, scheduler, epochs


def add_misc_flags(parser: Parser, classifier: bool = True) -> None:
    """Add the group `Miscellaneous parameters`; ``classifier`` says whether the model has classes."""
    group = parser.add_argument_group("Miscellaneous parameters")
    group.add_argument("--seed", type=SEED, default=42, help="seed of order, augmentation and initialisation")
    group.add_argument("--log-interval", type=COUNT, default=50, help="updates between log lines")
    group.add_argument("--val-interval", type=COUNT, default=1, help="epochs between evaluations")
    group.add_argument(
        "--recovery-interval", type=COUNT_OR_NONE, default=0, help="updates between recovery checkpoints, 0 for none"
    )
    group.add_argument("--checkpoint-hist", type=COUNT, default=10, help="checkpoints kept")
    group.add_argument("-j", "--workers", type=COUNT_OR_NONE, default=4, help="loader processes per device")
    group.add_argument(
        "--pin-mem",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="load into page-locked memory, from which a GPU copies while it computes",
    )
    group.add_argument("--output", default="", metavar="DIR", help="folder of runs, else ./output/train")
    group.add_argument("--experiment", default="", metavar="NAME", help="run name under --output, else time and model")
    group.add_argument("--log-wandb", action="store_true", help="log epochs to Weights & Biases as well")
    group.add_argument("--wandb-project", default=None, metavar="NAME", help="Weights & Biases project")
    if classifier:
        group.add_argument(
            "--eval-metric",
            default="top1",
            choices=["top1", "top5", "balanced_acc", "worst_class_recall"],
            help="metric that picks the best checkpoint",
        )
    group.add_argument("--debug", action="store_true", help="show the traceback of an error that is one line otherwise")
    parser.checks.append(_check_misc)


def loader_kwargs(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Arguments of the loaders that bring batches to ``device``."""
    return {"device": device, "num_workers": args.workers, "pin_memory": args.pin_mem and device.type == "cuda"}


def _check_misc(parser: Parser, args: argparse.Namespace) -> None:
    parser.refuse_unread(args, {"--log-wandb": (args.log_wandb, "wandb_project")})
    if args.log_wandb and importlib.util.find_spec("wandb") is None:
        parser.error("--log-wandb: wandb is not installed: pip install 'semivim[logging]'")
    if args.resume == "auto" and not args.experiment:
        parser.error("--resume auto: needs --experiment to know which run to look for")
