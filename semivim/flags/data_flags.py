"""Flags of data sets and augmentation, in timm's spelling, and the arguments that they become."""

import argparse
import re
from typing import Any

from PIL import ImageColor
from timm.data import create_transform

from semivim.flags.parser import COUNT, COUNT_OR_NONE, NON_NEGATIVE, POSITIVE, SHARE, SHARE_BELOW_ONE, Parser
from semivim.utils.pixels import PixelRules, usual_rules
from semivim.utils.preprocessing import image_channels
from semivim.utils.user_error import UserError

INTERPOLATIONS = ["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]


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


def add_dataset_flags(parser: Parser) -> None:
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
    pixel_flags(group)


def colour(text: str) -> str:
    """Type of a flag that holds a colour by name or as #rrggbb."""
    try:
        ImageColor.getrgb(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a colour, wanted one such as white or #ffffff") from None
    return text


def pixel_flags(group: argparse._ActionsContainer, otherwise: str = "") -> None:
    """Add the flags of ``PixelRules``.

    Args:
        group: Gets the flags.
        otherwise: What holds where a flag is not given, for the help; "" for what holds in training.
    """
    group.add_argument(
        "--alpha-background",
        type=colour,
        default=None,
        metavar="COLOUR",
        help=f"colour behind transparent pixels{otherwise or ', else white; four channels keep alpha'}",
    )
    group.add_argument(
        "--max-value",
        type=COUNT,
        default=None,
        metavar="N",
        help=f"white in grey images of over 8 bits{otherwise or ', else what the file states'}",
    )


def pixel_rules(args: argparse.Namespace, otherwise: PixelRules) -> PixelRules:
    """How pixels become 8 bits; ``otherwise`` holds what is not given.

    Raises:
        UserError: If a colour is given, and ``otherwise`` keeps alpha.
    """
    background = otherwise.alpha_background
    if args.alpha_background is not None:
        if background is None:
            raise UserError(f"--alpha-background: got {args.alpha_background}, but alpha is kept as the fourth channel")
        red, green, blue, *_ = ImageColor.getrgb(args.alpha_background)
        background = (red, green, blue)
    return PixelRules(background, otherwise.max_value if args.max_value is None else args.max_value)


def source_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``open_source`` beside the split."""
    options = {
        "class_map": args.class_map,
        "download": args.dataset_download,
        "input_key": args.input_key,
        "target_key": args.target_key,
        "trust_remote_code": args.dataset_trust_remote_code,
    }
    given = {name: value for name, value in options.items() if value}
    rules = pixel_rules(args, usual_rules(image_channels(vars(args))))
    return {"dataset": args.dataset, "data_dir": args.data_dir, "rules": rules, **given}


def _crop_flags(group: argparse._ActionsContainer) -> None:
    """Add the flags of every training view, and stochastic depth."""
    group.add_argument("--train-crop-mode", default=None, choices=["rrc", "rkrc", "rkrr"], help="random crop, else rrc")
    group.add_argument("--scale", type=POSITIVE, nargs=2, default=[0.08, 1.0], help="share of the area: from, to")
    group.add_argument("--ratio", type=POSITIVE, nargs=2, default=[3 / 4, 4 / 3], help="aspect ratio: from, to")
    group.add_argument("--hflip", type=SHARE, default=0.5, help="probability of a horizontal flip")
    group.add_argument("--vflip", type=SHARE, default=0.0, help="probability of a vertical flip")
    group.add_argument(
        "--train-interpolation",
        default="random",
        choices=["random", *INTERPOLATIONS],
        metavar="NAME",
        help=", ".join(["random (bilinear or bicubic)", *INTERPOLATIONS]),
    )
    group.add_argument(
        "--drop-path", type=SHARE_BELOW_ONE, default=None, help="stochastic depth rate, else the model's"
    )


def add_augmentation_flags(parser: Parser, classifier: bool = True) -> None:
    """Add the group `Augmentation and regularization parameters`; without a ``classifier`` crops and depth only."""
    where = " (labelled branch)" if classifier else ""
    group = parser.add_argument_group(f"Augmentation and regularization parameters{where}")
    _crop_flags(group)
    parser.checks.append(_check_crop)
    if classifier:
        _label_flags(group)
        parser.checks.append(_check_labelled)


def _check_crop(parser: Parser, args: argparse.Namespace) -> None:
    parser.refuse_falling(args, "scale ratio", equal=True)


def _label_flags(group: argparse._ActionsContainer) -> None:
    """Add the flags of labelled images."""
    group.add_argument("--no-aug", action="store_true", help="no training augmentation of labelled images")
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
    group.add_argument("--drop", type=SHARE_BELOW_ONE, default=0.0, help="dropout rate")


def _check_labelled(parser: Parser, args: argparse.Namespace) -> None:
    parser.refuse_falling(args, "cutmix_minmax")
    if mixes(args) and args.batch_size % 2:
        parser.error(f"--mixup and --cutmix pair images: --batch-size must be even, got {args.batch_size}")
    conditions = {
        "--reprob above 0": (args.reprob, "remode recount"),
        "--mixup or --cutmix": (mixes(args), "mixup_prob mixup_switch_prob mixup_mode mixup_off_epoch"),
    }
    parser.refuse_unread(args, conditions)


def crop_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``View`` that every training view shares: crop, flips and interpolation."""
    return {
        "train_crop_mode": args.train_crop_mode,
        "scale": args.scale,
        "ratio": args.ratio,
        "hflip": args.hflip,
        "vflip": args.vflip,
        "interpolation": args.train_interpolation,
    }


def view_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``View`` for labelled images, beside its size and normalisation."""
    return crop_kwargs(args) | {
        "no_aug": args.no_aug,
        "color_jitter": args.color_jitter,
        "color_jitter_prob": args.color_jitter_prob,
        "grayscale_prob": args.grayscale_prob or 0.0,
        "gaussian_blur_prob": args.gaussian_blur_prob or 0.0,
        "auto_augment": args.aa,
        "re_prob": args.reprob,
        "re_mode": args.remode,
        "re_count": args.recount,
    }


def least_crop(args: argparse.Namespace) -> float:
    """Least share of an image's area that a training crop shows at its full width or height."""
    return args.scale[0] * args.ratio[0]


def mixes(args: argparse.Namespace) -> bool:
    """Whether labelled batches are mixed by mixup or cutmix."""
    return bool(args.mixup or args.cutmix or args.cutmix_minmax)


def mixup_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of timm's ``Mixup`` beside the number of classes."""
    return {
        "mixup_alpha": args.mixup,
        "cutmix_alpha": args.cutmix,
        "cutmix_minmax": args.cutmix_minmax,
        "prob": args.mixup_prob,
        "switch_prob": args.mixup_switch_prob,
        "mode": args.mixup_mode,
        "label_smoothing": args.smoothing,
    }
