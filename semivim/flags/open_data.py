"""Open the images that the flags name, and draw or read back their label split."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from semivim.data import (
    ImageSource,
    LabelSplit,
    check_sources,
    complete_split,
    draw_validation,
    join_sources,
    listed_classes,
    load_split,
    make_split,
    open_source,
    open_unlabelled_folder,
    read_list,
    select_images,
    split_from_lists,
)
from semivim.flags.data_flags import source_kwargs
from semivim.flags.ssl_flags import complete_split_kwargs, make_split_kwargs


def open_data(args: argparse.Namespace, split_folder: Path | None) -> tuple[ImageSource, ImageSource, LabelSplit]:
    """Open training and validation images and draw the label split, or read back the one of a resumed run.

    Args:
        args: The parsed flags.
        split_folder: Folder of the run to resume, None for a new one.

    Returns:
        Training images, which those held out for validation are among; validation images; the split.

    Raises:
        UserError: If images are missing, labels or lists do not suit them, or a split cannot be drawn.
    """
    holds_out = bool(args.val_fraction or args.val_list)
    options = {"num_classes": args.num_classes, **source_kwargs(args)}
    source = open_source(split=args.train_split, is_whole=holds_out, **options)
    if args.labeled_list and not source.num_classes:
        source.class_names = listed_classes(args.labeled_list)
    val_source = None if holds_out else open_source(split=args.val_split, **options)
    num_classes = args.num_classes or source.num_classes
    check_sources(source, val_source, args.val_split, num_classes)
    listed = source  # lists name images of the dataset, before others join it
    if args.unlabeled_dir:
        unlabelled_source = open_unlabelled_folder(args.unlabeled_dir)
        check_sources(unlabelled_source, val_source, args.val_split, num_classes)
        source = join_sources(source, unlabelled_source)
    if split_folder:
        split = load_split(split_folder, source.labels, num_classes, source.names, source.class_names)
    else:
        split = _new_split(args, source, listed, num_classes)
    return source, val_source or select_images(source, split.validation, split.labels), split


def _new_split(args: argparse.Namespace, source: ImageSource, listed: ImageSource, num_classes: int) -> LabelSplit:
    """Take the split from lists, which name images of the first source of a joined one, or draw it."""
    options: dict[str, Any] = {"class_names": source.class_names}
    if not args.labeled_list:
        if args.val_list:
            options["validation"] = read_list(args.val_list, listed, num_classes, args.data_dir).positions
        elif args.val_fraction:
            drawn = {"seed": args.split_seed, "fold": args.fold}
            options["validation"] = draw_validation(source.labels, num_classes, args.val_fraction, **drawn)
        return make_split(source.labels, num_classes, **options, **make_split_kwargs(args))
    options |= complete_split_kwargs(args)
    lists = args.labeled_list, args.unlabeled_list, args.data_dir, args.val_list
    split = split_from_lists(listed, num_classes, *lists, **options)
    known = len(listed)
    labels = np.concatenate([split.labels, source.labels[known:]])
    unlabelled = np.concatenate([split.unlabelled, np.arange(known, len(source))])
    options |= {"validation": split.validation, "describe": source.describe}
    return complete_split(labels, num_classes, split.labelled, unlabelled, **options)
