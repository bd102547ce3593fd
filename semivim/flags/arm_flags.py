"""Flags of autoregressive pretraining that timm's scripts do not have, and the arguments that they become."""

import argparse
import os
from typing import Any

from semivim.flags.data_flags import crop_kwargs
from semivim.flags.parser import COUNT, Parser


def add_arm_flags(parser: Parser) -> None:
    """Add the group `Autoregressive pretraining`."""
    group = parser.add_argument_group("Autoregressive pretraining")
    group.add_argument(
        "--directions",
        default="forward",
        choices=["forward", "both"],
        help="scans that train: forward, copied into the backward ones at export, or both, half the batch each",
    )
    group.add_argument("--cluster", type=COUNT, default=4, help="side of a cluster, in patches")
    group.add_argument("--dec-dim", type=COUNT, default=512, help="channels of the decoder")
    group.add_argument("--dec-depth", type=COUNT, default=4, help="blocks of the decoder")
    group.add_argument(
        "--unlabeled-dir",
        default=None,
        metavar="DIR",
        help="more images, any sub-folders; alone, each 100th is held out to evaluate",
    )
    parser.checks.append(_check_arm)


def _check_arm(parser: Parser, args: argparse.Namespace) -> None:
    if args.directions == "both" and args.batch_size < 2:
        parser.error(f"--directions both halves a batch: --batch-size must be 2 or more, got {args.batch_size}")
    if args.layer_decay is not None:
        parser.error(f"--layer-decay is for fine-tuning, whose lower layers are trained: got {args.layer_decay:g}")
    heap_alone = args.unlabeled_dir and not (args.dataset or args.data_dir)
    has_splits = not (heap_alone or os.path.isfile(args.data_dir or ""))  # else images are held out of one source
    parser.refuse_unread(args, {"a data set of splits, no heap or tar file": (has_splits, "train_split val_split")})


def arm_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``ArmModel`` beside the backbone."""
    return {
        "cluster": args.cluster,
        "directions": args.directions,
        "decoder_dim": args.dec_dim,
        "decoder_depth": args.dec_depth,
    }


def arm_view_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``View`` for training images, beside its size and normalisation: crops and flips, nothing else."""
    return crop_kwargs(args) | {"color_jitter": None}
