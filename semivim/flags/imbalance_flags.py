"""Flags for rare classes: priors of the classes in the losses, at export, and rules of the confidence threshold."""

import argparse
from typing import Any

from semivim.flags.parser import NON_NEGATIVE, POSITIVE, SHARE_BELOW_ONE, Parser
from semivim.task.posthoc import POSTHOC_PRIORS
from semivim.task.pseudo_label_rule import PSEUDO_PRIORS, THRESHOLD_MODES

# The running means and the heads that a resumed run reads back are those of these values.
PRIOR_FLAGS = ("debias_pseudo", "pseudo_prior", "threshold_mode", "logit_adjust_tau")
SHORT_RUN_UPDATES = 5000  # below, running means must forget the untrained model faster


def add_imbalance_flags(parser: Parser) -> None:
    """Add the group `Rare classes`."""
    group = parser.add_argument_group("Rare classes")
    group.add_argument(
        "--debias-pseudo",
        type=NON_NEGATIVE,
        default=0.0,
        metavar="LAMBDA",
        help="subtract the teacher's own mean prediction from pseudo-labels (DebiasPL); 1 for long tails, 0 where "
        "unlabelled classes are distributed against the labels",
    )
    group.add_argument(
        "--logit-adjust-tau", type=NON_NEGATIVE, default=0.0, help="logit-adjusted loss on labels, 1 for the full prior"
    )
    group.add_argument(
        "--pseudo-prior",
        default="none",
        choices=PSEUDO_PRIORS,
        help="prior of the unlabelled images in the adjusted loss; estimated where it may differ from the labels'",
    )
    group.add_argument(
        "--soft-pseudo-labels",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="train on the whole distribution of a pseudo-label; else only with --pseudo-prior estimated",
    )
    group.add_argument(
        "--prior-momentum",
        type=SHARE_BELOW_ONE,
        default=None,
        help=f"of the running means, else 0.99 in runs under {SHORT_RUN_UPDATES} updates, 0.999 in longer ones",
    )
    group.add_argument(
        "--threshold-mode",
        default="fixed",
        choices=THRESHOLD_MODES,
        help="freematch, softmatch: a threshold, or weights, from the running confidence instead of --threshold",
    )
    group.add_argument(
        "--posthoc-debias",
        default="none",
        choices=POSTHOC_PRIORS,
        help="remove a prior from the saved model's head, the labels' or the mean prediction on unlabelled images; "
        "top-1 on a long-tailed test set falls",
    )
    group.add_argument("--posthoc-tau", type=POSITIVE, default=1.0, help="strength of --posthoc-debias")
    parser.checks.append(_check_imbalance)


def _check_imbalance(parser: Parser, args: argparse.Namespace) -> None:
    if args.debias_pseudo and args.pseudo_prior != "none":
        parser.error(
            f"--debias-pseudo {args.debias_pseudo:g} and --pseudo-prior {args.pseudo_prior} correct the same bias: "
            "give one"
        )
    if args.logit_adjust_tau and args.posthoc_debias == "labeled":
        parser.error("--posthoc-debias labeled removes the labels' prior, which --logit-adjust-tau has removed already")
    supervised = args.ssl_method == "supervised"
    pseudo_labels = "debias_pseudo pseudo_prior soft_pseudo_labels prior_momentum threshold_mode"
    parser.name_unused(args, f"--ssl-method {args.ssl_method}", pseudo_labels if supervised else "")
    means = args.debias_pseudo or args.pseudo_prior == "estimated" or args.threshold_mode != "fixed"
    conditions = {
        "--logit-adjust-tau": (supervised or args.logit_adjust_tau, "pseudo_prior"),
        "--debias-pseudo, --pseudo-prior estimated or --threshold-mode": (supervised or means, "prior_momentum"),
        "--threshold-mode fixed": (supervised or args.threshold_mode == "fixed", "threshold"),
        "--posthoc-debias": (args.posthoc_debias != "none", "posthoc_tau"),
    }
    parser.refuse_unread(args, conditions)


def rule_kwargs(args: argparse.Namespace, total_updates: int) -> dict[str, Any]:
    """Arguments of ``PseudoLabelRule`` beside the classes; without pseudo-labels that of the labelled loss.

    Args:
        args: The parsed flags.
        total_updates: Updates of the whole run.
    """
    if args.ssl_method == "supervised":
        return {"tau": args.logit_adjust_tau}
    soft, momentum = args.soft_pseudo_labels, args.prior_momentum
    if momentum is None:
        momentum = 0.99 if total_updates < SHORT_RUN_UPDATES else 0.999
    return {
        "debias": args.debias_pseudo,
        "tau": args.logit_adjust_tau,
        "pseudo_prior": args.pseudo_prior,
        "soft": args.pseudo_prior == "estimated" if soft is None else soft,
        "threshold": args.threshold,
        "threshold_mode": args.threshold_mode,
        "momentum": momentum,
    }
