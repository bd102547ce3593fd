#!/usr/bin/env python3
"""Train a DyVM from a plain Vim, which also teaches it: what to drop, and what to compute for each image.

    PYTHONPATH=. python benchmarks/train_dyvm.py --data-dir DIR --model dyvm_small --teacher vim_small_patch16_224 \
        --opt adamw --weight-decay 1e-8 --lr 2.5e-5 --epochs 30 --warmup-epochs 5 --warmup-lr 1e-5 --min-lr 1e-6 \
        --mixup 0.8 --cutmix 1 --aa rand-m9-mstd0.5-inc1 --reprob 0.25 --color-jitter 0.3 -b 64
    PYTHONPATH=. python benchmarks/train_dyvm.py ... --teacher local-dir:RUN --experiment NAME --resume auto

The first line is the release's recipe for Vim-S at 256 images an update, without its repeated augmentation.
``--teacher`` is a plain Vim with weights, as ``semivim predict --model`` takes it: a timm name with published weights,
``hf-hub:ORG/NAME``, or the folder of a run, such as one of ``train_ssl.py --ssl-method supervised --model vim_...``.
All labels are used. A run folder gets what one of train_ssl.py does, with the best student as model.safetensors.
"""

import argparse
import logging
import os
import time
from contextlib import ExitStack
from functools import partial
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import timm
import torch
from timm.data import Mixup
from timm.utils import is_primary, random_seed, setup_default_logging
from torch import Tensor

import semivim  # noqa: F401  registers the models
from semivim.data import Batch, EvaluationLoader, ImageStream, StreamLoader, View, check_sources, open_source
from semivim.flags.data_flags import (
    add_augmentation_flags,
    add_dataset_flags,
    mixes,
    mixup_kwargs,
    source_kwargs,
    view_kwargs,
)
from semivim.flags.model_flags import add_device_flags, add_model_flags, create_model, mixed_precision, open_device
from semivim.flags.parser import Parser, flag, parse_flags
from semivim.flags.train_flags import (
    OPTIMIZER_OPTIONS,
    add_misc_flags,
    add_optimizer_flags,
    add_schedule_flags,
    clip_kwargs,
    create_optimizer,
    loader_kwargs,
)
from semivim.inference import load_model
from semivim.models import DyVM
from semivim.runs.checkpoint import save_best, schedule_state
from semivim.runs.open_run import find_run, open_run
from semivim.runs.optimizer_step import mean_lr, optimizer_step, update_seed
from semivim.runs.progress import Progress, add_over_ranks
from semivim.runs.report import Panel, results_table, write_report
from semivim.runs.run_folder import CURVES, METRICS, WEIGHTS
from semivim.task.dyvm import LOSSES, DyVMTask
from semivim.utils.metrics import evaluate
from semivim.utils.preprocessing import resolve_preprocessing
from semivim.utils.stop_signal import StopSignal
from semivim.utils.user_error import UserError, one_line, user_errors_end_the_program

# What a resumed run may not change, with the flags that set it.
FIXED = {name: flag(name) for name in ("teacher", "img_size", "input_size")} | {
    "images_per_update": "--batch-size x --grad-accum-steps x processes",
    "updates_per_epoch": "--train-batches-per-epoch",
}
FIXED_OPTIMIZER = {name: flag(name) for name in OPTIMIZER_OPTIONS}
FIGURES = (*LOSSES, "kept_tokens", "kept_gates")
EVAL_COLUMNS = ("top1", "top5", "balanced_acc", "worst_class_recall")
PANELS = (
    Panel("loss", LOSSES),
    Panel("top-1 (%)", ("top1",)),
    Panel("share kept", ("kept_tokens", "kept_gates")),
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The groups of train_ssl.py that are not semi-supervised training's, and the teacher."""
    parser = Parser(description="Train a DyVM from a plain Vim.", allow_abbrev=False)
    add_dataset_flags(parser)
    add_model_flags(parser, model="dyvm_tiny")
    add_device_flags(parser)
    add_optimizer_flags(parser)
    add_schedule_flags(parser)
    add_augmentation_flags(parser)
    add_misc_flags(parser)
    group = parser.add_argument_group("Dynamic Vision Mamba")
    group.add_argument("--teacher", required=True, metavar="NAME", help="plain Vim with weights; see above")
    args = parse_flags(parser, argv)
    parser.check(args)
    for name, wanted in (("initial_checkpoint", ""), ("pretrained", False), ("tune_scope", "all")):
        if getattr(args, name) != wanted:
            parser.error(f"{flag(name)} is not read: the student starts from --teacher, and all of it trains")
    return args


def load_teacher(name: str, student: DyVM, device: torch.device) -> torch.nn.Module:
    """Load the plain Vim, and let the student start from it.

    Raises:
        UserError: If it has no weights, or is not the student without routers and gates.
    """
    try:
        teacher = load_model(name, pretrained=timm.is_model(name))
    except UserError as error:
        raise type(error)(str(error).replace("--model", "--teacher", 1)) from error
    try:
        student.load_vim(teacher.state_dict())
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--teacher {name} does not fit the student: {one_line(error)}") from error
    return teacher.to(device)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train; returns what metrics.json holds."""
    args = parse_args(argv)
    with user_errors_end_the_program("train_dyvm.py", args.debug), ExitStack() as stack:
        return train(args, stack)


# C901, PLR0915: a script is read from top to bottom
def train(args: argparse.Namespace, stack: ExitStack) -> dict[str, Any]:  # noqa: C901, PLR0915
    """Set up data, student and teacher, train, evaluate and report; ``stack`` ends with the run."""
    found = find_run(args.output, args.experiment, args.resume, args.model)
    config = {k: v for k, v in vars(args).items() if k != "resume"}
    device = open_device(args)
    if args.distributed:
        stack.callback(torch.distributed.destroy_process_group)
    random_seed(args.seed)

    # Data
    source = open_source(split=args.train_split, **source_kwargs(args))
    val_source = open_source(split=args.val_split, **source_kwargs(args))
    num_classes = args.num_classes or source.num_classes
    check_sources(source, val_source, args.val_split, num_classes)
    counts = np.bincount(source.labels[source.labels >= 0], minlength=num_classes).tolist()

    # Student and teacher
    model = create_model(args, num_classes)
    if not isinstance(model, DyVM):
        raise UserError(f"--model {args.model} is a {type(model).__name__}, wanted a DyVM, such as dyvm_small")
    teacher = load_teacher(args.teacher, model, device)
    model.to(device)
    data_config = resolve_preprocessing(model, f"--model {args.model}", vars(args))
    view = partial(View, data_config["input_size"], data_config["mean"], data_config["std"])
    ranks, loading = {"rank": args.rank, "world_size": args.world_size}, loader_kwargs(args, device)
    known = np.flatnonzero(source.labels >= 0)
    views = [view(**view_kwargs(args))]
    stream = ImageStream(source, known, views, args.batch_size, labels=source.labels, seed=args.seed, **ranks)
    loader = StreamLoader([stream], **loading)
    eval_view = view(is_training=False, **{k: data_config[k] for k in ("interpolation", "crop_pct", "crop_mode")})
    eval_loader = EvaluationLoader(
        val_source, eval_view, args.validation_batch_size or args.batch_size, **loading, **ranks
    )
    mixup = Mixup(**mixup_kwargs(args), num_classes=num_classes) if mixes(args) else None

    # Optimizer, schedule, task
    accum = args.grad_accum_steps
    per_update = args.batch_size * accum * args.world_size
    epoch_updates = args.train_batches_per_epoch or max(1, len(known) // per_update)
    sizes = {"images_per_update": per_update, "updates_per_epoch": epoch_updates}
    found.check_unchanged(config | sizes, FIXED if args.no_resume_opt else FIXED | FIXED_OPTIMIZER)
    optimizer, scheduler, epochs = create_optimizer(args, model, epoch_updates, per_update)
    autocast, scaler = mixed_precision(args, device)
    clip = clip_kwargs(args)
    progress = Progress()
    task = DyVMTask(model, teacher, smoothing=args.smoothing, progress=progress, device=device)
    found.restore(progress, task, None if args.no_resume_opt else optimizer, scheduler, scaler)
    if args.start_epoch is not None:
        progress.restart(args.start_epoch, epoch_updates)
    if args.torchcompile:
        task.compile(args.torchcompile, args.torchcompile_mode)
    if args.distributed:
        task.prepare_distributed(device_ids=[device] if device.type == "cuda" else None)

    # Output
    run = stack.enter_context(
        open_run(
            found,
            progress,
            primary=is_primary(args),
            config=config,
            sizes=sizes,
            total_updates=epochs * epoch_updates,
            train_columns=(*FIGURES, "skipped"),
            eval_columns=EVAL_COLUMNS,
            log_wandb=args.log_wandb,
            wandb_project=args.wandb_project,
            export=partial(save_best, {"student": model}, found.folder, source.class_names, data_config, source.rules),
            model=model,
            optimizer=optimizer,
            amp_scaler=scaler,
            max_history=args.checkpoint_hist,
            task=task,
        )
    )
    log = run.log
    if run.saver:
        loader.unreadable.update(progress.unreadable)
        log.say(f"{found.folder}: {args.model} taught by {args.teacher}, {len(known)} labels, {device}")

    # Train
    steps = loader.steps(progress.num_updates * accum)
    stack.callback(steps.close)
    stop = stack.enter_context(StopSignal(device))

    def forward(batches: tuple[Batch, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        (image,), label = batches[0]
        if mixup is not None:
            image, label = mixup(image, label)
        result = task(image, label)
        return result["loss"], {name: result[name] for name in FIGURES}

    def means(sums: dict[str, Tensor]) -> dict[str, float]:
        return {name: (sums[name] / sums["batches"]).item() for name in FIGURES} | {"skipped": sums["skipped"].item()}

    def measure() -> dict[str, Any]:
        metrics = evaluate(model, eval_loader, num_classes, device, autocast, train_counts=counts)
        return {"model": "student", **metrics}

    if args.sched_on_updates:
        scheduler.step_update(progress.num_updates)
    elif progress.num_epochs:
        scheduler.step(progress.num_epochs)
    student = dict[str, Any]()
    for epoch in range(progress.num_epochs, epochs):
        task.train()
        if mixup is not None and args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
            mixup.mixup_enabled = False
        while progress.num_updates < (epoch + 1) * epoch_updates:
            batches = [next(steps) for _ in range(accum)]
            random_seed(update_seed(args.seed, progress.num_updates, args.rank))
            step = optimizer_step(task, batches, forward, optimizer, autocast=autocast, scaler=scaler, clip=clip)
            run.step_done(step.taken, progress.num_updates)
            progress.add(step.figures)
            if args.sched_on_updates:
                scheduler.step_update(progress.num_updates)
            log.step(per_update)
            if progress.num_updates % args.log_interval == 0:
                log.record({"lr": mean_lr(optimizer), **means(add_over_ranks(progress.interval))})
                progress.interval = {}
            if args.recovery_interval and progress.num_updates % args.recovery_interval == 0:
                progress.gather(loader.unreadable)
                run.save_recovery(progress)
            if signal_number := stop.asked():
                progress.gather(loader.unreadable)
                run.stop(progress, signal_number)

        progress.gather(loader.unreadable)
        student = {}
        if (epoch + 1) % args.val_interval == 0 or epoch + 1 == epochs:
            run.save_recovery(progress)
            student = measure()
            log.record({"epoch": epoch, "top1": student["top1"]})
        figures = means(add_over_ranks(progress.epoch))
        scheduler.step(epoch + 1, student.get(args.eval_metric))
        progress.num_epochs, progress.epoch, progress.schedule = epoch + 1, {}, schedule_state(scheduler)
        log.epoch(epoch, figures, student, mean_lr(optimizer))
        if run.saver:
            run.saver.save_epoch(epoch, student, args.eval_metric)
    student = student or measure()

    # Report
    results = {
        "student": student,
        "best": run.saver.read_best(progress.num_epochs - 1, student) if run.saver else {},
        "class_names": source.class_names,
        "token_ratio": model.token_ratio,
        "unreadable_images": {source.describe(i): n for i, n in progress.unreadable.items()},
        "updates": progress.num_updates,
        "seconds": time.perf_counter() - log.start_s,
    }
    if run.saver:
        write_report(found.folder, results, log.records, PANELS, f"{args.model} taught by {args.teacher}")
        log.say(results_table({"student": student}, source.class_names))
        log.say(f"{found.folder}: {WEIGHTS} (best student), {METRICS}, {CURVES}")
    return results


if __name__ == "__main__":
    setup_default_logging()
    logging.getLogger("timm.utils.checkpoint_saver").setLevel(logging.WARNING)  # lists every file at every save
    main()
