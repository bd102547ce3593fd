"""The loaders that a run of semi-supervised training needs, as its flags say."""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from semivim.data import (
    EvaluationLoader,
    ImageSource,
    ImageStream,
    LabelSplit,
    StreamLoader,
    View,
    least_side,
    sample_images,
)
from semivim.flags.data_flags import least_crop, view_kwargs
from semivim.flags.ssl_flags import strong_view_kwargs, weak_view_kwargs
from semivim.flags.train_flags import loader_kwargs
from semivim.utils.user_error import UserError


def create_loaders(
    args: argparse.Namespace,
    source: ImageSource,
    val_source: ImageSource,
    split: LabelSplit,
    data_config: dict[str, Any],
    num_unlabelled: int,
    device: torch.device,
) -> tuple[StreamLoader, EvaluationLoader, Callable[[], Iterator[Tensor]]]:
    """Open the loaders of a run.

    Args:
        args: The parsed flags.
        source: Training images.
        val_source: Images to evaluate on.
        split: Which training images are labelled, and which unlabelled.
        data_config: Preprocessing, as timm's ``resolve_input_data_config`` gives it.
        num_unlabelled: Unlabelled images of a batch, in a weak and a strong view; 0 for none.
        device: Where batches go.

    Returns:
        Training batches, evaluation batches, and what gives a sample of the unlabelled images as evaluation sees them.

    Raises:
        UserError: If unlabelled images are needed and there are none.
    """
    if (num_unlabelled or args.posthoc_debias == "unlabeled") and not len(split.unlabelled):
        raise UserError(
            f"no unlabelled image is left: all {len(split.labelled)} are labelled; label fewer, add unlabelled "
            f"ones (--unlabeled-dir, --unlabeled-include-labeled) or train with --ssl-method supervised and without "
            f"--posthoc-debias unlabeled"
        )
    # Not those to evaluate on: `predict` sees images as evaluation does, and decodes them whole.
    source.least_side = least_side(data_config["input_size"], least_crop(args))
    view = partial(View, data_config["input_size"], data_config["mean"], data_config["std"])
    ranks = {"rank": args.rank, "world_size": args.world_size}
    stream: Callable[..., ImageStream] = partial(ImageStream, source, labels=split.labels, seed=args.seed, **ranks)
    streams = [stream(split.labelled, [view(**view_kwargs(args))], args.batch_size)]
    if num_unlabelled:
        weak, strong = view(**weak_view_kwargs(args)), view(**strong_view_kwargs(args))
        streams.append(stream(split.unlabelled, [weak, strong], num_unlabelled, stream=1))
    eval_view = view(is_training=False, **{k: data_config[k] for k in ("interpolation", "crop_pct", "crop_mode")})
    eval_size, loading = args.validation_batch_size or args.batch_size, loader_kwargs(args, device)
    evaluation = EvaluationLoader(val_source, eval_view, eval_size, **loading, **ranks)
    num_sampled = min(len(split.unlabelled), max(2000, 50 * split.num_classes))
    sample = partial(sample_images, source, split.unlabelled, eval_view, eval_size, num_sampled, **loading, **ranks)
    return StreamLoader(streams, **loading), evaluation, sample
