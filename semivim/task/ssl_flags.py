"""Command line flags of semi-supervised training, beside those shared with timm."""

import argparse

from semivim.task.semi_supervised import METHODS, PSEUDO_MIXUPS
from semivim.utils.train_flags import non_negative_int, positive_int, share


def add_semi_supervised_flags(parser: argparse.ArgumentParser) -> None:
    """Add the groups `Semi-supervised method`, `Label split`, `Unlabelled views` and `LyapEMA`."""
    group = parser.add_argument_group("Semi-supervised method")
    group.add_argument(
        "--ssl-method", default="lyapema", choices=METHODS, help="who labels the weak view (%(default)s)"
    )
    group.add_argument("--pseudo-mixup", default="none", choices=PSEUDO_MIXUPS, help="ss: SSMixup (%(default)s)")
    group.add_argument("--threshold", type=share, default=0.7, help="least confidence, tau (%(default)s)")
    group.add_argument("--unlabeled-weight", type=float, default=1.0, help="weight of the unlabelled loss, mu")
    group.add_argument(
        "--unlabeled-ratio",
        type=positive_int,
        default=5,
        help="unlabelled per labelled image (%(default)s)",
    )
    group.add_argument("--ssmixup-nu", type=float, default=0.1, help="weight of the mixed hidden state (%(default)s)")
    group.add_argument("--ssmixup-c", default="own", choices=["own", "fwd", "bwd", "mean"], help="C that reads it")
    group.add_argument("--ssmixup-layers", type=positive_int, default=None, help="last blocks mixed (all)")

    group = parser.add_argument_group("Label split")
    group.add_argument("--label-fraction", type=share, default=None, help="labelled share of each class")
    group.add_argument("--labels-per-class", type=positive_int, default=None, help="labels of each class")
    group.add_argument("--min-per-class", type=non_negative_int, default=1, help="(%(default)s)")
    group.add_argument("--imb-n1", type=positive_int, default=None, help="labels of the largest class")
    group.add_argument("--imb-m1", type=positive_int, default=None, help="unlabelled of the largest class")
    group.add_argument("--imb-factor-l", type=float, default=1.0, help="largest to smallest class, labelled")
    group.add_argument("--imb-factor-u", type=float, default=1.0, help="the same, unlabelled; negative reverses")
    group.add_argument("--labeled-list", default=None, metavar="FILE", help="list of labelled images")
    group.add_argument("--unlabeled-list", default=None, metavar="FILE", help="list of unlabelled images (the rest)")
    group.add_argument("--unlabeled-dir", default=None, metavar="DIR", help="more unlabelled images, any sub-folders")
    group.add_argument(
        "--unlabeled-include-labeled", action="store_true", help="labelled images count as unlabelled too"
    )
    group.add_argument("--fold", type=non_negative_int, default=0, help="fold of the split (%(default)s)")
    group.add_argument("--split-seed", type=int, default=0, help="seed of the split, apart from --seed (%(default)s)")

    group = parser.add_argument_group("Unlabelled views")
    group.add_argument("--weak-color-jitter", type=float, default=0.0, help="colour jitter of the weak view")
    group.add_argument("--strong-aa", default="rand-m9-mstd0.5-inc1", metavar="NAME", help="policy of the strong view")
    group.add_argument("--strong-reprob", type=share, default=0.25, help="random erasing, strong view")

    group = parser.add_argument_group("LyapEMA")
    group.add_argument("--lyap-mode", default="default", choices=["default", "paper_stable", "literal"], help="preset")
    group.add_argument("--lyap-min-decay", type=share, default=None, help="least decay (mode's)")
    group.add_argument("--lyap-gamma", type=float, default=None, help="sensitivity of the decay (mode's)")
    group.add_argument("--lyap-radius", type=float, default=None, help="relative radius where V is free (mode's)")


def check_semi_supervised_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with one line where flags contradict each other, or one is given that nothing would read."""
    flags = ("label_fraction", "labels_per_class", "imb_n1", "labeled_list")
    given = ["--" + flag.replace("_", "-") for flag in flags if getattr(args, flag) is not None]
    if len(given) != 1:
        wanted = "give one of --label-fraction, --labels-per-class, --imb-n1 or --labeled-list"
        parser.error(f"{wanted}, got {' and '.join(given) or 'none'}")
    if args.ssl_method == "supervised" and args.pseudo_mixup != "none":
        parser.error(f"--pseudo-mixup {args.pseudo_mixup}: --ssl-method supervised has no pseudo-labels to mix")
    if (args.mixup or args.cutmix or args.cutmix_minmax) and args.batch_size % 2:
        parser.error(f"--mixup and --cutmix pair images: --batch-size must be even, got {args.batch_size}")
    owners = {
        "--ssl-method lyapema": (args.ssl_method == "lyapema", "lyap_mode lyap_min_decay lyap_gamma lyap_radius"),
        "--pseudo-mixup ss": (args.pseudo_mixup == "ss", "ssmixup_nu ssmixup_c ssmixup_layers"),
        "--labeled-list": (args.labeled_list is not None, "unlabeled_list"),
        "another --ssl-method: lyapema brings its own warm-up": (args.ssl_method != "lyapema", "model_ema_warmup"),
    }
    for owner, (on, names) in owners.items():
        for name in names.split():
            if not on and getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name.replace('_', '-')} is read only with {owner}")
