"""Flags of semi-supervised training that timm's scripts do not have, and the arguments that they become."""

import argparse
from typing import Any

from semivim.flags.data_flags import augment_policy, crop_kwargs
from semivim.flags.parser import COUNT, COUNT_OR_NONE, NON_NEGATIVE, SHARE, SHARE_BELOW_ONE, Number, Parser, flag
from semivim.task.semi_supervised import METHODS, PSEUDO_MIXUPS
from semivim.utils.lyap_ema import PRESETS

# A resumed run reads its label split back, so other values of the flags that drew it would be ignored.
SPLIT_FLAGS = (
    "label_fraction", "labels_per_class", "min_per_class", "imb_n1", "imb_m1", "imb_factor_l", "imb_factor_u",
    "unlabeled_include_labeled", "fold", "split_seed", "labeled_list", "unlabeled_list",
    "val_fraction", "val_list",
)  # fmt: skip


def add_semi_supervised_flags(parser: Parser) -> None:
    """Add the groups `Semi-supervised method`, `Label split`, `Unlabelled views` and `LyapEMA`."""
    group = parser.add_argument_group("Semi-supervised method")
    group.add_argument("--ssl-method", default="lyapema", choices=METHODS, help="who labels the weak view")
    group.add_argument(
        "--pseudo-mixup", default="none", choices=PSEUDO_MIXUPS, help="mixing of the strong view; ss is SSMixup"
    )
    group.add_argument("--threshold", type=SHARE_BELOW_ONE, default=0.7, help="least confidence that trains, tau")
    group.add_argument("--unlabeled-weight", type=NON_NEGATIVE, default=1.0, help="weight of the unlabelled loss, mu")
    group.add_argument("--unlabeled-ratio", type=COUNT, default=5, help="unlabelled images per labelled one")
    group.add_argument("--ssmixup-nu", type=NON_NEGATIVE, default=0.1, help="weight of the mixed hidden state, nu")
    group.add_argument("--ssmixup-c", default="own", choices=["own", "fwd", "bwd", "mean"], help="C that reads it")
    group.add_argument("--ssmixup-layers", type=COUNT, default=None, help="number of last blocks that mix, else all")

    group = parser.add_argument_group("Label split")
    group.add_argument(
        "--label-fraction", type=Number(0, 1, ends="(]"), default=None, help="labelled share of each class"
    )
    group.add_argument("--labels-per-class", type=COUNT, default=None, help="labelled images of each class")
    group.add_argument(
        "--min-per-class",
        type=COUNT_OR_NONE,
        default=1,
        help="least labels of a class, 0 to accept classes without any",
    )
    group.add_argument("--imb-n1", type=COUNT, default=None, help="labelled images of the first, largest class")
    group.add_argument("--imb-m1", type=COUNT, default=None, help="unlabelled images of the first class, else the rest")
    group.add_argument("--imb-factor-l", type=Number(1), default=1.0, help="labels of the first class over the last's")
    group.add_argument(
        "--imb-factor-u", type=Number(), default=1.0, help="the same, unlabelled; <= -1 reverses the classes"
    )
    group.add_argument("--labeled-list", default=None, metavar="FILE", help="list of labelled images")
    group.add_argument(
        "--unlabeled-list", default=None, metavar="FILE", help="list of unlabelled images, else the rest"
    )
    group.add_argument("--unlabeled-dir", default=None, metavar="DIR", help="more unlabelled images, any sub-folders")
    group.add_argument(
        "--unlabeled-include-labeled", action="store_true", help="labelled images count as unlabelled too"
    )
    group.add_argument(
        "--val-fraction",
        type=Number(0, 1, ends="()"),
        default=None,
        help="share of each class to validate with, held out of the training images, in place of --val-split",
    )
    group.add_argument(
        "--val-list", default=None, metavar="FILE", help="list of training images to validate with, likewise"
    )
    group.add_argument("--fold", type=COUNT_OR_NONE, default=0, help="number of the split for its seed")
    group.add_argument("--split-seed", type=COUNT_OR_NONE, default=0, help="seed of the split, apart from --seed")

    group = parser.add_argument_group("Unlabelled views")
    group.add_argument("--weak-color-jitter", type=NON_NEGATIVE, default=0.0, help="colour jitter of the weak view")
    group.add_argument(
        "--strong-aa",
        type=augment_policy,
        default="rand-m9-mstd0.5-inc1",
        metavar="POLICY",
        help="as --aa, strong view",
    )
    group.add_argument("--strong-reprob", type=SHARE, default=0.25, help="random erasing, strong view")

    group = parser.add_argument_group("LyapEMA")
    group.add_argument("--lyap-mode", default="default", choices=list(PRESETS), help="preset")
    group.add_argument(
        "--lyap-min-decay", type=SHARE, default=None, help="least decay, else the mode's or --model-ema-decay"
    )
    group.add_argument(
        "--lyap-gamma", type=NON_NEGATIVE, default=None, help="sensitivity of the decay, else the mode's"
    )
    group.add_argument(
        "--lyap-radius", type=NON_NEGATIVE, default=None, help="relative radius where V is free, else the mode's"
    )
    parser.checks += [_check_method, _check_split, _check_lyapema]


def _check_method(parser: Parser, args: argparse.Namespace) -> None:
    lyapema, supervised = args.ssl_method == "lyapema", args.ssl_method == "supervised"
    unlabelled = "threshold unlabeled_weight weak_color_jitter strong_aa strong_reprob pseudo_mixup"
    ssmixup = "ssmixup_nu ssmixup_c ssmixup_layers"
    parser.refuse_unread(args, {"--pseudo-mixup ss": (args.pseudo_mixup == "ss", ssmixup)})
    # A method of several is compared by changing --ssl-method alone.
    unread = f"{unlabelled} {ssmixup}" if supervised else ""
    unread += "" if lyapema else " lyap_mode lyap_min_decay lyap_gamma lyap_radius"
    parser.name_unused(args, f"--ssl-method {args.ssl_method}", unread)


def _check_split(parser: Parser, args: argparse.Namespace) -> None:
    flags = ("label_fraction", "labels_per_class", "imb_n1", "labeled_list")
    given = [flag(name) for name in flags if getattr(args, name) is not None]
    if len(given) > 1 or not (given or args.unlabeled_dir):
        wanted = "give one of --label-fraction, --labels-per-class, --imb-n1 or --labeled-list"
        parser.error(f"{wanted}, got {' and '.join(given) or 'none'}")
    if abs(args.imb_factor_u) < 1:
        parser.error(f"argument --imb-factor-u: {args.imb_factor_u:g} is not >= 1 or, to reverse the classes, <= -1")
    conditions = {
        "--labeled-list": (args.labeled_list, "unlabeled_list"),
        "a split that is drawn, without --labeled-list": (not args.labeled_list, "fold split_seed val_fraction"),
        "--imb-n1": (args.imb_n1, "imb_m1 imb_factor_l imb_factor_u"),
        "--imb-m1": (args.imb_m1, "imb_factor_u"),
    }
    parser.refuse_unread(args, conditions)
    if args.val_fraction and args.val_list:
        parser.error("give one of --val-fraction and --val-list, got both")
    if held_out := args.val_fraction or args.val_list:
        parser.refuse_unread(args, {"neither --val-fraction nor --val-list": (not held_out, "val_split")})


def _check_lyapema(parser: Parser, args: argparse.Namespace) -> None:
    lyapema, preset = args.ssl_method == "lyapema", PRESETS[args.lyap_mode]
    least = args.lyap_min_decay or 0.0
    if lyapema and "decay" in preset and args.model_ema_decay < least:
        parser.error(f"--model-ema-decay {args.model_ema_decay:g} is below --lyap-min-decay {least:g}")
    conditions = {
        "--lyap-mode default": (
            not lyapema or "decay" in preset,
            "model_ema_decay model_ema_warmup lyap_min_decay",
        ),
        "--lyap-mode default or paper_stable": (not lyapema or "v_radius" in preset, "lyap_radius"),
    }
    parser.refuse_unread(args, conditions)


def complete_split_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``split_from_lists`` and ``complete_split`` beside the images."""
    return {"min_per_class": args.min_per_class, "include_labelled": args.unlabeled_include_labeled}


def make_split_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``make_split`` beside the images; beside a heap of unlabelled images all others are labelled."""
    is_drawn = args.labels_per_class or args.imb_n1
    return complete_split_kwargs(args) | {
        "fraction": args.label_fraction or (None if is_drawn else 1.0),
        "per_class": args.labels_per_class,
        "imb_n1": args.imb_n1,
        "imb_m1": args.imb_m1,
        "imb_factor_l": args.imb_factor_l,
        "imb_factor_u": args.imb_factor_u,
        "seed": args.split_seed,
        "fold": args.fold,
    }


def weak_view_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``View`` for the weak view, beside its size and normalisation."""
    return crop_kwargs(args) | {"color_jitter": args.weak_color_jitter}


def strong_view_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``View`` for the strong view, beside its size and normalisation."""
    return crop_kwargs(args) | {
        "color_jitter": None,
        "auto_augment": args.strong_aa or None,
        "re_prob": args.strong_reprob,
    }


def ssmixup_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the model that mixes hidden states, {} for one that does not."""
    if args.pseudo_mixup != "ss" or args.ssl_method == "supervised":
        return {}
    return {"ssmixup_c": args.ssmixup_c, "ssmixup_layers": args.ssmixup_layers}


def task_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``SemiSupervisedTask`` beside the model, its classes and the rule of its pseudo-labels."""
    return {
        "method": args.ssl_method,
        "pseudo_mixup": args.pseudo_mixup,
        "unlabelled_weight": args.unlabeled_weight,
        "smoothing": args.smoothing,
        "ssmixup_nu": args.ssmixup_nu,
    }


def teacher_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``SemiSupervisedTask.setup_ema``."""
    if args.ssl_method != "lyapema":
        # ModelEmaV3 starts one step later than LyapEmaV3, with a copy of the student
        return {"decay": args.model_ema_decay, "use_warmup": args.model_ema_warmup, "update_after_step": -1}
    has_warmup = args.lyap_mode == "default"
    return {
        "mode": args.lyap_mode,
        "decay": args.model_ema_decay if has_warmup else None,
        "use_warmup": args.model_ema_warmup if has_warmup else None,
        "min_decay": args.lyap_min_decay,
        "gamma": args.lyap_gamma,
        "v_radius": args.lyap_radius,
        "on_nonfinite": "skip",
    }
