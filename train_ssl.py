#!/usr/bin/env python3
"""Semi-supervised training of a Vision Mamba with few labels (Semi-ViM, stage 3; ``supervised`` is its stage 2).

    python train_ssl.py                                   demo on scikit-learn's digits, 4 labels a class, on a CPU
    python train_ssl.py --data-dir DIR --label-fraction 0.1 --model semivim_small --img-size 224 --opt adamw --lr 5e-4
    torchrun --nproc-per-node 8 train_ssl.py ...          the same on 8 GPUs
    python train_ssl.py -c RUN/args.yaml --resume RUN/last.pth.tar

A run folder OUTPUT/EXPERIMENT gets args.yaml, labelled.txt and unlabelled.txt (the split), summary.csv, checkpoints,
metrics.jsonl, metrics.json, curves.png, and the best teacher as model.safetensors with a timm config.json.
"""

import argparse
import importlib
import json
import logging
import sys
import time
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import yaml
from timm.data import Mixup, resolve_input_data_config
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from timm.utils import (
    NativeScaler,
    init_distributed_device,
    is_primary,
    random_seed,
    setup_default_logging,
)

import semivim  # noqa: F401  registers the models
from semivim.data import (
    ImageSource,
    LabelSplit,
    SslLoader,
    StepBatches,
    UnreadableImageError,
    View,
    Views,
    check_sources,
    complete_split,
    create_eval_loader,
    join_sources,
    load_split,
    make_split,
    open_source,
    open_unlabelled_folder,
    save_split,
    split_from_lists,
)
from semivim.flags import train_flags
from semivim.flags.parser import Parser
from semivim.flags.ssl_flags import add_semi_supervised_flags, check_semi_supervised_flags
from semivim.runs.checkpoint import AtomicCheckpointSaver, load_training_checkpoint, save_best
from semivim.runs.optimizer_step import mean_lr, sum_over_ranks, summarise, train_step, update_seed
from semivim.runs.report import write_report
from semivim.runs.run_folder import (
    check_unchanged,
    find_checkpoint,
    own_folder,
    refuse_going_back,
    refuse_other_run,
    restore,
    run_folder,
    schedule_state,
)
from semivim.runs.run_log import RunLog
from semivim.task.semi_supervised import SemiSupervisedTask
from semivim.utils.files import UNREADABLE, one_line, write_text
from semivim.utils.metrics import evaluate

try:
    import wandb
except ImportError:
    wandb = None

_logger = logging.getLogger("train")

MODEL_FLAGS = ("model", "model_kwargs", "initial_checkpoint", "pretrained_path")  # that an error of the model names
MAX_SKIPPED_STEPS = 20  # in a row, before a run that only meets non-finite gradients is stopped

# What `python train_ssl.py` runs: every value can be overridden on the command line.
DEMO: dict[str, Any] = {
    "dataset": "embedded/digits", "model": "semivim_pico", "in_chans": 1, "mean": [0.5], "std": [0.5],
    "labels_per_class": 4, "pseudo_mixup": "ss", "batch_size": 16, "unlabeled_ratio": 4,
    "epochs": 20, "train_batches_per_epoch": 15, "sched_on_updates": True, "warmup_epochs": 2,
    "opt": "adamw", "lr": 2e-3, "weight_decay": 0.05, "model_ema_decay": 0.99,
    "scale": [0.6, 1.0], "hflip": 0.0, "color_jitter": 0.0, "strong_aa": "rand-m5-mstd0.5-inc1",
    "workers": 0, "val_interval": 5, "log_interval": 15, "checkpoint_hist": 2,
}  # fmt: skip


def build_parser() -> Parser:
    """Flags shared with timm's train.py first, then our own."""
    parser = Parser(
        description="Semi-supervised training of a Vision Mamba. Without a dataset it runs a demo on digits.",
        allow_abbrev=False,
    )
    train_flags.add_dataset_flags(parser)
    train_flags.add_model_flags(parser, model="semivim_tiny")
    train_flags.add_device_flags(parser)
    train_flags.add_optimizer_flags(parser)
    train_flags.add_schedule_flags(parser)
    train_flags.add_augmentation_flags(parser)
    train_flags.add_ema_flags(parser)
    train_flags.add_misc_flags(parser)
    add_semi_supervised_flags(parser)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse flags and ``-c`` file; without a dataset the demo's values become the defaults."""
    parser = build_parser()
    args = train_flags.parse_flags(parser, argv)
    if not (args.dataset or args.data_dir):
        against = {  # demo values that make way for what is given
            "labels_per_class": args.label_fraction or args.imb_n1 or args.labeled_list,
            "pseudo_mixup": args.ssl_method == "supervised",
            "lr": args.lr_base != parser.get_default("lr_base"),
            "sched_on_updates": args.sched == "plateau",
        }
        parser = build_parser()
        args = train_flags.parse_flags(parser, argv, {key: DEMO[key] for key in DEMO if not against.get(key)})
    train_flags.check_train_flags(parser, args)
    check_semi_supervised_flags(parser, args)
    if args.log_wandb and wandb is None:
        parser.error("--log-wandb: wandb is not installed: pip install 'semivim[logging]'")
    if args.resume == "auto" and not args.experiment:
        parser.error("--resume auto: needs --experiment to know which run to look for")
    return args


def open_data(args: argparse.Namespace, split_folder: Path | None) -> tuple[ImageSource, ImageSource, LabelSplit]:
    """Open training and validation images and draw the label split, or read back the one of a resumed run."""
    options = {"class_map": args.class_map, "download": args.dataset_download}
    options |= {"input_key": args.input_key, "target_key": args.target_key}
    options = {key: value for key, value in options.items() if value}
    if args.dataset_trust_remote_code:
        options["trust_remote_code"] = True
    source = open_source(args.dataset, args.data_dir, args.train_split, args.num_classes, **options)
    val_source = open_source(args.dataset, args.data_dir, args.val_split, args.num_classes, **options)
    num_classes = args.num_classes or source.num_classes
    check_sources(source, val_source, args.val_split, num_classes)
    listed, known = source, len(source)
    if args.unlabeled_dir:
        unlabelled_source = open_unlabelled_folder(args.unlabeled_dir)
        check_sources(unlabelled_source, val_source, args.val_split, num_classes)
        source = join_sources(source, unlabelled_source)
    include = {"min_per_class": args.min_per_class, "include_labelled": args.unlabeled_include_labeled}
    if split_folder:
        return source, val_source, load_split(split_folder, source.labels, num_classes, source.names)
    if args.labeled_list:  # lists name images of the dataset, so they are read before others join it
        split = split_from_lists(listed, num_classes, args.labeled_list, args.unlabeled_list, args.data_dir, **include)
        labels = np.concatenate([split.labels, source.labels[known:]])
        unlabelled = np.concatenate([split.unlabelled, np.arange(known, len(source))])
        return source, val_source, complete_split(labels, num_classes, split.labelled, unlabelled, **include)
    split = make_split(
        source.labels,
        num_classes,
        fraction=args.label_fraction,
        per_class=args.labels_per_class,
        imb_n1=args.imb_n1,
        imb_m1=args.imb_m1,
        imb_factor_l=args.imb_factor_l,
        imb_factor_u=args.imb_factor_u,
        seed=args.split_seed,
        fold=args.fold,
        **include,
    )
    return source, val_source, split


def create_student(args: argparse.Namespace, num_classes: int) -> torch.nn.Module:
    """Create the model named on the command line."""
    kwargs: dict[str, Any] = dict(args.model_kwargs)
    if args.pseudo_mixup == "ss":
        kwargs.update(ssmixup_c=args.ssmixup_c, ssmixup_layers=args.ssmixup_layers)
    in_chans = args.in_chans or (args.input_size[0] if args.input_size else None)
    img_size = args.img_size or (tuple(args.input_size[1:]) if args.input_size else None)
    if img_size:
        kwargs["img_size"] = img_size
    try:
        model = timm.create_model(
            args.model,
            pretrained=args.pretrained,
            pretrained_cfg_overlay={"file": args.pretrained_path} if args.pretrained_path else None,
            checkpoint_path=args.initial_checkpoint,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=args.gp,
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,
            **kwargs,
        )
    except UNREADABLE as error:  # an unknown name or option, weights that are missing, damaged or another model's
        given = [f"--{k.replace('_', '-')} {v}" for k in MODEL_FLAGS if (v := getattr(args, k))]
        raise ValueError(f"{' '.join(given)}: {one_line(error)}") from error
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    return model


def create_optimizer(
    args: argparse.Namespace, model: torch.nn.Module, epoch_updates: int
) -> tuple[torch.optim.Optimizer, Scheduler, int]:
    """Optimizer, schedule of its learning rate, and the epochs of that schedule."""
    try:
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
        scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=epoch_updates)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"--opt {args.opt}, --opt-kwargs, --sched {args.sched}: {one_line(error)}") from error
    if args.start_epoch is not None and args.start_epoch >= epochs:
        raise ValueError(f"--start-epoch is {args.start_epoch}, wanted less than the {epochs} epochs of the schedule")
    return optimizer, scheduler, epochs


def create_views(args: argparse.Namespace, data_config: dict[str, Any]) -> tuple[Views, View]:
    """Labelled, weak and strong training views, and the evaluation view."""
    make = partial(View, data_config["input_size"], data_config["mean"], data_config["std"])
    crop = {
        "train_crop_mode": args.train_crop_mode,
        "scale": args.scale,
        "ratio": args.ratio,
        "hflip": args.hflip,
        "vflip": args.vflip,
        "interpolation": args.train_interpolation,
    }
    labelled = make(
        **crop,
        no_aug=args.no_aug,
        color_jitter=args.color_jitter,
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob or 0.0,
        gaussian_blur_prob=args.gaussian_blur_prob or 0.0,
        auto_augment=args.aa,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
    )
    weak = make(**crop, color_jitter=args.weak_color_jitter)
    strong = make(**crop, color_jitter=None, auto_augment=args.strong_aa or None, re_prob=args.strong_reprob)
    evaluation = make(is_training=False, **{k: data_config[k] for k in ("interpolation", "crop_pct", "crop_mode")})
    return Views(labelled, weak, strong), evaluation


def create_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    """Mixup of the labelled batch, None where the flags leave it off."""
    if not (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax):
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train; gives back what metrics.json holds."""
    args = parse_args(argv)
    try:
        with ExitStack() as stack:
            return train(args, stack)
    except (ValueError, UnreadableImageError) as error:  # what a user can mend: one line, no traceback
        sys.exit(f"train_ssl.py: error: {error}")


def train(args: argparse.Namespace, stack: ExitStack) -> dict[str, Any]:
    """Set up data, student, teacher and optimizer, train, evaluate and report; ``stack`` ends with the run."""
    folder = run_folder(args.output, args.experiment, args.resume, args.model, args.ssl_method)
    config = {k: v for k, v in vars(args).items() if k != "resume"}
    for module in args.device_modules or []:
        importlib.import_module(module)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = init_distributed_device(args)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--device {args.device}: {one_line(error)}") from error
    if args.distributed:
        stack.callback(torch.distributed.destroy_process_group)  # gloo's threads abort a process that just ends
    random_seed(args.seed)  # alike on all ranks, which start from one student and one teacher

    # Checkpoint to resume
    path = find_checkpoint(args.resume, folder)
    continues = path is not None and path.parent.resolve() == folder.resolve()
    if not continues:
        refuse_other_run(folder)
    checkpoint = load_training_checkpoint(path) if path else None
    if args.resume:
        _logger.info(f"{folder} goes on from {path}" if path else f"{folder} holds nothing to resume: a new run")

    # Data
    source, val_source, split = open_data(args, path.parent if path else None)
    num_classes = split.num_classes
    class_names = source.class_names
    used = split.labels[np.union1d(split.labelled, split.unlabelled)]
    counts = np.bincount(used[used >= 0], minlength=num_classes).tolist()  # for the many, medium and few groups

    # Student
    model = create_student(args, num_classes).to(device)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    data_config = resolve_input_data_config(model, vars(args))
    views, eval_view = create_views(args, data_config)
    ratio = 0 if args.ssl_method == "supervised" else args.unlabeled_ratio
    ranks = {"rank": args.rank, "world_size": args.world_size}
    batches = StepBatches(source, split, views, args.batch_size, ratio * args.batch_size, seed=args.seed, **ranks)
    loader = SslLoader(batches, args.workers, pin_memory=args.pin_mem)
    eval_loader = create_eval_loader(
        val_source, eval_view, args.validation_batch_size or args.batch_size, args.workers, args.pin_mem, **ranks
    )
    mixup = create_mixup(args, num_classes)

    # Optimizer, schedule; an epoch is one pass over the unlabelled images, whatever the method
    accum = args.grad_accum_steps
    per_update = args.batch_size * accum * args.world_size
    num_unlabelled = len(split.unlabelled)
    one_pass = num_unlabelled // args.unlabeled_ratio if num_unlabelled else len(split.labelled)  # in labelled images
    epoch_updates = args.train_batches_per_epoch or max(1, one_pass // per_update)
    sizes = {"labelled_per_update": per_update, "updates_per_epoch": epoch_updates}
    if checkpoint:
        check_unchanged(vars(checkpoint["args"]), config | sizes, keep_optimizer=not args.no_resume_opt)
    args.lr = train_flags.scaled_lr(args, per_update)
    optimizer, scheduler, epochs = create_optimizer(args, model, epoch_updates)
    amp_dtype = getattr(torch, args.amp_dtype)
    if args.amp and device.type == "cpu" and amp_dtype is torch.float16:
        raise ValueError("--amp-dtype float16 needs a GPU, whose gradients are scaled: give --amp-dtype bfloat16")
    autocast = partial(torch.autocast, device.type, dtype=amp_dtype) if args.amp else nullcontext
    scaler = NativeScaler() if args.amp and device.type == "cuda" and amp_dtype is torch.float16 else None
    clip = {"clip_grad": args.clip_grad, "clip_mode": args.clip_mode}

    # Task and teacher
    task = SemiSupervisedTask(
        model,
        num_classes,
        method=args.ssl_method,
        pseudo_mixup=args.pseudo_mixup,
        threshold=args.threshold,
        unlabelled_weight=args.unlabeled_weight,
        smoothing=args.smoothing,
        ssmixup_nu=args.ssmixup_nu,
        ssmixup_ramp_steps=args.warmup_epochs * epoch_updates,
        device=device,
    )
    if args.ssl_method == "lyapema":
        task.setup_ema(
            mode=args.lyap_mode,
            decay=args.model_ema_decay if args.lyap_mode == "default" else None,
            min_decay=args.lyap_min_decay,
            gamma=args.lyap_gamma,
            v_radius=args.lyap_radius,
            on_nonfinite="skip",
        )
    else:
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)

    # Resume
    if checkpoint:
        restore(checkpoint, path, task, None if args.no_resume_opt else optimizer, scheduler, scaler)
        if continues and args.resume != "auto":  # the newest has no best model before it
            refuse_going_back(path, task.num_epochs)
    if args.start_epoch is not None:
        task.num_epochs, task.num_updates = args.start_epoch, args.start_epoch * epoch_updates
        task.interval_sums, task.epoch_sums = {}, {}
    task.trainable_module_ema.attach(optimizer, model)
    if args.torchcompile:
        task.compile(args.torchcompile, args.torchcompile_mode)
    if args.distributed:
        task.prepare_distributed(device_ids=[device] if device.type == "cuda" else None)

    # Output
    saver, log = None, RunLog(None, 0, task.num_updates)
    if is_primary(args):
        stack.enter_context(own_folder(folder, args.resume, path))
        save_split(split, folder, source.names)
        write_text(folder / "args.yaml", yaml.safe_dump(config, sort_keys=False))
        saver = AtomicCheckpointSaver(
            model,
            optimizer,
            args=argparse.Namespace(**config | sizes),
            amp_scaler=scaler,
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
            max_history=args.checkpoint_hist,
            task=task,
        )
        if checkpoint and continues:
            saver.load_state_dict(checkpoint["saver"])
        if args.log_wandb:
            wandb.init(project=args.wandb_project, name=folder.name, config=config)
        log = RunLog(folder, epochs * epoch_updates, task.num_updates, task.num_epochs)
        loader.unreadable.update(task.unreadable)  # rank 0 keeps the earlier counts of all
        log.say(f"{folder}: {args.model}, {args.ssl_method}, pseudo-mixup {args.pseudo_mixup}, {device}")
        log.say(split.report())

    if args.sched_on_updates:
        scheduler.step_update(task.num_updates)
    elif task.num_epochs:  # plateau would take epoch 0 for warm-up
        scheduler.step(task.num_epochs)
    steps = loader.steps(task.num_updates * accum)
    measure = partial(
        evaluate, loader=eval_loader, num_classes=num_classes, device=device, autocast=autocast, train_counts=counts
    )
    skipped_in_a_row = 0
    student, teacher = dict[str, Any](), dict[str, Any]()
    for epoch in range(task.num_epochs, epochs):
        task.train()
        if mixup is not None and args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
            mixup.mixup_enabled = False
        while task.num_updates < (epoch + 1) * epoch_updates:
            images = [next(steps) for _ in range(accum)]
            # All randomness of an update comes from its number, so a resumed run draws what the unbroken one would.
            random_seed(update_seed(args.seed, task.num_updates, args.rank))
            taken = train_step(task, images, optimizer, autocast, scaler, mixup, clip, device)
            skipped_in_a_row = 0 if taken else skipped_in_a_row + 1
            if skipped_in_a_row > MAX_SKIPPED_STEPS:
                raise ValueError(
                    f"gradients were not finite in {skipped_in_a_row} steps in a row at update {task.num_updates}: "
                    f"lower --lr, set --clip-grad, or turn --amp off; resume from {folder / 'last.pth.tar'}"
                )
            task.num_updates += 1
            task.update_ema(step=task.num_updates)
            if args.sched_on_updates:
                scheduler.step_update(task.num_updates)
            log.step((1 + ratio) * per_update)
            if task.num_updates % args.log_interval == 0:
                log.record({"lr": mean_lr(optimizer), **summarise(task.interval_sums, task)})
                task.interval_sums = {}
            if args.recovery_interval and task.num_updates % args.recovery_interval == 0:
                task.unreadable = sum_over_ranks(loader.unreadable)
                if saver:
                    saver.save_recovery(epoch, task.num_updates)

        task.unreadable = sum_over_ranks(loader.unreadable)
        metric, student, teacher = None, {}, {}
        if (epoch + 1) % args.val_interval == 0 or epoch + 1 == epochs:
            if saver:
                saver.save_recovery(epoch, task.num_updates)  # a kill while evaluating must not cost the epoch
            student, teacher = measure(task.get_eval_model()), measure(task.get_eval_model(ema=True))
            metric = teacher[args.eval_metric]
        means = summarise(task.epoch_sums, task)
        scheduler.step(epoch + 1, metric)
        task.num_epochs, task.epoch_sums, task.schedule = epoch + 1, {}, schedule_state(scheduler)
        if saver:
            log.epoch(epoch, means, student, teacher, mean_lr(optimizer), args.log_wandb)
            # The model first: killed in between, the epoch is done again and finds the same best.
            if metric is not None and (saver.best_metric is None or metric > saver.best_metric):
                best = {"epoch": epoch, **teacher}
                save_best(task.trainable_module_ema.module, folder, class_names, data_config, best)
            saver.save_checkpoint(epoch, metric)
    log.close()
    if not teacher:  # resumed at its end
        student, teacher = measure(task.get_eval_model()), measure(task.get_eval_model(ema=True))

    # Report
    best = {}
    if saver:
        if not (folder / "best.json").exists():  # no epoch of this run was evaluated before
            best = {"epoch": task.num_epochs - 1, **teacher}
            save_best(task.trainable_module_ema.module, folder, class_names, data_config, best)
        best = json.loads((folder / "best.json").read_text())
    results = {
        "student": student,
        "teacher": teacher,
        "best": best,
        "class_names": class_names,
        "split": {"sha256": split.sha256, "labels_per_class": split.labels_per_class.tolist()}
        | {"num_labelled": len(split.labelled), "num_unlabelled": len(split.unlabelled)},
        "unreadable_images": {source.describe(i): n for i, n in task.unreadable.items()},
        "updates": task.num_updates,
        "seconds": time.perf_counter() - log.start_s,
    }
    if saver:
        title = f"{args.model}, {args.ssl_method}, pseudo-mixup {args.pseudo_mixup}, {len(split.labelled)} labels"
        write_report(folder, results, args.eval_metric, log, title)
    return results


if __name__ == "__main__":
    setup_default_logging()
    logging.getLogger("timm.utils.checkpoint_saver").setLevel(logging.WARNING)  # lists every file at every save
    main()
