#!/usr/bin/env python3
"""Autoregressive pretraining of a Vision Mamba on images without labels (ARM; Semi-ViM, stage 1).

    python train_arm.py                                   demo on scikit-learn's two photographs, on a CPU
    python train_arm.py --data-dir DIR --model semivim_small
    python train_arm.py --unlabeled-dir HEAP ...          images in any folders; each 100th is held out
    python train_arm.py --data-dir FILE.tar ...           likewise
    torchrun --nproc-per-node 8 train_arm.py ...          the same on 8 GPUs
    python train_ssl.py --initial-checkpoint RUN/model.safetensors --model semivim_small --gp avg ...

A run folder OUTPUT/EXPERIMENT gets args.yaml, summary.csv, checkpoints, metrics.jsonl, metrics.json, curves.png,
predictions.png (after each epoch), and the backbone of the least held-out loss as model.safetensors with a timm
config.json: all of the model's weights but the classifier's.
"""

import argparse
import logging
import os
import time
from contextlib import ExitStack
from functools import partial
from typing import Any

# OpenMP reads this when torch is loaded. Threads that spin while they wait waste a core that other work could use.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from timm.utils import is_primary, random_seed, setup_default_logging

import semivim  # noqa: F401  registers the models
from semivim.data import (
    Batch,
    EvaluationLoader,
    ImageSource,
    ImageStream,
    StreamLoader,
    View,
    join_sources,
    least_side,
    open_source,
    open_unlabelled_folder,
    refuse_shared,
)
from semivim.flags.arm_flags import add_arm_flags, arm_kwargs, arm_view_kwargs
from semivim.flags.data_flags import add_augmentation_flags, add_dataset_flags, least_crop, source_kwargs
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
from semivim.models.arm_decoder import ArmModel, copy_forward_direction, set_fixed_position
from semivim.runs.checkpoint import save_best, schedule_state
from semivim.runs.open_run import find_run, open_run
from semivim.runs.optimizer_step import mean_lr, optimizer_step, update_seed
from semivim.runs.progress import Progress, add_over_ranks
from semivim.runs.report import Panel, save_images, write_report
from semivim.runs.run_folder import CURVES, METRICS, PREDICTIONS, WEIGHTS
from semivim.task.arm import ArmTask, held_out_loss, predicted_images
from semivim.utils.preprocessing import resolve_preprocessing
from semivim.utils.stop_signal import StopSignal
from semivim.utils.user_error import UserError, one_line, user_errors_end_the_program

# What a resumed run may not change, with the flags that set it.
FIXED = {name: flag(name) for name in ("directions", "cluster", "img_size", "input_size")} | {
    "images": "number of images (--data-dir, --unlabeled-dir)",
    "images_per_update": "--batch-size x --grad-accum-steps x processes",
    "updates_per_epoch": "--train-batches-per-epoch",
}
FIXED_OPTIMIZER = {name: flag(name) for name in OPTIMIZER_OPTIONS}
HELD_OUT = 100  # of a heap or a tar file one image of so many is held out
PICTURED = 6  # held-out images of the picture
PANELS = (Panel("loss", ("loss", "held_out_loss", "loss_of_zero")), Panel("learning rate", ("lr",)))

# ARM's recipe for its base model, with the length of its ablations: 300 epochs, the first 40 to warm up.
RECIPE: dict[str, Any] = {
    "img_size": 192, "opt": "adamw", "opt_betas": [0.9, 0.95], "weight_decay": 0.05, "clip_grad": 3.0,
    "lr_base": 1.5e-4, "lr_base_scale": "linear", "sched_on_updates": True, "warmup_lr": 0.0,
    "epochs": 260, "warmup_epochs": 40, "warmup_prefix": True, "scale": [0.2, 1.0], "train_interpolation": "bicubic",
}  # fmt: skip
# What `python train_arm.py` runs beside it: every value can be overridden on the command line.
DEMO: dict[str, Any] = {
    "dataset": "embedded/photos", "model": "semivim_pico", "img_size": 64, "model_kwargs": {"patch_size": 8},
    "cluster": 2, "dec_dim": 128, "dec_depth": 2, "batch_size": 32, "lr": 2e-3, "epochs": 10, "warmup_epochs": 2,
    "scale": [0.3, 1.0], "workers": 0, "log_interval": 5, "checkpoint_hist": 2,
}  # fmt: skip


def build_parser() -> Parser:
    """Flags shared with timm's train.py first, then our own."""
    parser = Parser(
        description="Autoregressive pretraining of a Vision Mamba. Without images it runs a demo on two photographs.",
        allow_abbrev=False,
    )
    add_dataset_flags(parser)
    add_model_flags(parser, model="semivim_tiny", classifier=False)
    add_device_flags(parser)
    add_optimizer_flags(parser)
    add_schedule_flags(parser)
    add_augmentation_flags(parser, classifier=False)
    add_misc_flags(parser, classifier=False)
    add_arm_flags(parser)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse flags and ``-c`` file over the recipe; without images the demo's values become the defaults."""
    parser = build_parser()
    args = parse_flags(parser, argv, RECIPE)
    against = {  # values that make way for what is given
        "img_size": args.input_size,
        "lr": args.lr_base != RECIPE["lr_base"],
        "sched_on_updates": args.sched == "plateau",
    }
    demo = {} if args.dataset or args.data_dir or args.unlabeled_dir else DEMO
    if demo or any(against.values()):
        parser = build_parser()
        args = parse_flags(parser, argv, {k: v for k, v in (RECIPE | demo).items() if not against.get(k)})
    parser.check(args)
    return args


def hold_out(source: ImageSource, named: str) -> tuple[ImageSource, np.ndarray, ImageSource, np.ndarray]:
    """Hold the first of each ``HELD_OUT`` images out of a source, ``named`` so in an error; see :func:`open_data`."""
    if len(source) == 1:
        raise UserError(f"{named} holds one image, wanted one more to evaluate on")
    held_out = np.arange(len(source)) % HELD_OUT == 0
    return source, np.flatnonzero(~held_out), source, np.flatnonzero(held_out)


def open_data(args: argparse.Namespace) -> tuple[ImageSource, np.ndarray, ImageSource, np.ndarray]:
    """Open the images to train on and those held out; each a source and its positions."""
    heap = open_unlabelled_folder(args.unlabeled_dir) if args.unlabeled_dir else None
    if heap and not (args.dataset or args.data_dir):
        heap.rules = source_kwargs(args)["rules"]
        return hold_out(heap, f"--unlabeled-dir {args.unlabeled_dir}")
    options = {"needs_labels": False, **source_kwargs(args)}
    source = open_source(split=args.train_split, **options)
    if os.path.isfile(args.data_dir or ""):  # a tar file, which has no splits
        return hold_out(join_sources(source, heap) if heap else source, f"--data-dir {args.data_dir}")
    val_source = open_source(split=args.val_split, **options)
    refuse_shared(source, val_source, args.val_split)
    if heap:
        refuse_shared(heap, val_source, args.val_split)
        source = join_sources(source, heap)
    return source, np.arange(len(source)), val_source, np.arange(len(val_source))


def create_loaders(
    args: argparse.Namespace, data_config: dict[str, Any], device: torch.device
) -> tuple[StreamLoader, EvaluationLoader, torch.Tensor]:
    """Training batches, held-out batches, and held-out images for the picture, ``(b, c, h, w)``."""
    source, positions, val_source, val_positions = open_data(args)
    source.least_side = least_side(data_config["input_size"], least_crop(args))
    view = partial(View, data_config["input_size"], data_config["mean"], data_config["std"])
    eval_view = view(is_training=False, **{k: data_config[k] for k in ("interpolation", "crop_pct", "crop_mode")})
    ranks = {"rank": args.rank, "world_size": args.world_size}
    loading = loader_kwargs(args, device)
    stream = ImageStream(source, positions, [view(**arm_view_kwargs(args))], args.batch_size, seed=args.seed, **ranks)
    eval_size = args.validation_batch_size or args.batch_size
    held_out = EvaluationLoader(val_source, eval_view, eval_size, positions=val_positions, **loading, **ranks)
    chosen = val_positions[:: max(1, len(val_positions) // PICTURED)][:PICTURED]
    pictured = next(iter(EvaluationLoader(val_source, eval_view, PICTURED, device, positions=chosen)), None)
    if pictured is None:
        raise UserError(f"none of {len(chosen)} held-out images can be read, such as {val_source.describe(chosen[0])}")
    return StreamLoader([stream], **loading), held_out, pictured.image


def create_arm(args: argparse.Namespace) -> ArmModel:
    """Create the backbone and its decoder; a backbone without weights gets ARM's position embedding."""
    backbone = create_model(args, num_classes=0)
    try:
        model = ArmModel(backbone, **arm_kwargs(args))
    except ValueError as error:
        sizes = f"--model {args.model}, --img-size, --cluster {args.cluster}, --dec-dim {args.dec_dim}"
        raise UserError(f"{sizes}: {one_line(error)}") from error
    if not (args.pretrained or args.initial_checkpoint):
        set_fixed_position(model.backbone)
        copy_forward_direction(model.backbone)  # both directions begin equal
    return model


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train; returns what metrics.json holds."""
    args = parse_args(argv)
    with user_errors_end_the_program("train_arm.py", args.debug), ExitStack() as stack:
        return train(args, stack)


# C901, PLR0915: a script is read from top to bottom
def train(args: argparse.Namespace, stack: ExitStack) -> dict[str, Any]:  # noqa: C901, PLR0915
    """Set up data, model and optimizer, train, evaluate and report; ``stack`` ends with the run."""
    found = find_run(args.output, args.experiment, args.resume, f"{args.model}-arm")
    config = {k: v for k, v in vars(args).items() if k != "resume"}
    device = open_device(args)
    if args.distributed:
        stack.callback(torch.distributed.destroy_process_group)  # gloo's threads abort a process that just ends
    random_seed(args.seed)  # alike on all ranks, which start from one model

    # Model, data
    model = create_arm(args).to(device)
    data_config = resolve_preprocessing(model.backbone, f"--model {args.model}", vars(args))
    loader, eval_loader, pictured = create_loaders(args, data_config, device)

    # Optimizer, schedule; an epoch is one pass over the images
    accum = args.grad_accum_steps
    per_update = args.batch_size * accum * args.world_size
    num_images = len(loader.streams[0].order.positions)
    epoch_updates = args.train_batches_per_epoch or max(1, num_images // per_update)
    sizes = {"images": num_images, "images_per_update": per_update, "updates_per_epoch": epoch_updates}
    found.check_unchanged(config | sizes, FIXED if args.no_resume_opt else FIXED | FIXED_OPTIMIZER)
    optimizer, scheduler, epochs = create_optimizer(args, model, epoch_updates, per_update, decreasing_metric=True)
    autocast, scaler = mixed_precision(args, device)
    clip = clip_kwargs(args)

    # Task
    progress = Progress()
    task = ArmTask(model, progress, device=device)

    # Resume
    found.restore(progress, task, None if args.no_resume_opt else optimizer, scheduler, scaler)
    if args.start_epoch is not None:
        progress.restart(args.start_epoch, epoch_updates)
    if args.torchcompile:
        task.compile(args.torchcompile, args.torchcompile_mode)
    if args.distributed:
        task.prepare_distributed(device_ids=[device] if device.type == "cuda" else None)

    # Output
    def export(metrics: dict[str, Any]) -> None:
        metrics = {"model": "backbone", **metrics}
        save_best({"backbone": model.export()}, found.folder, None, data_config, loader.source.rules, metrics)

    run = stack.enter_context(
        open_run(
            found,
            progress,
            primary=is_primary(args),
            config=config,
            sizes=sizes,
            total_updates=epochs * epoch_updates,
            train_columns=("loss",),
            eval_columns=("loss", "loss_of_zero"),
            log_wandb=args.log_wandb,
            wandb_project=args.wandb_project,
            export=export,
            decreasing=True,
            model=model,
            optimizer=optimizer,
            amp_scaler=scaler,
            max_history=args.checkpoint_hist,
            task=task,
        )
    )
    log, title = run.log, f"{args.model}, ARM {args.directions}"
    if run.saver:
        loader.unreadable.update(progress.unreadable)  # rank 0 keeps the earlier counts of all
        log.say(f"{found.folder}: {title}, {device}")
        log.say(
            f"{num_images:,} images, {model.num_clusters} clusters of {model.cluster_size} patches, {epochs} epochs "
            f"of {epoch_updates} updates"
        )

    # Train
    steps = loader.steps(progress.num_updates * accum)
    stack.callback(steps.close)  # ends loader processes
    stop = stack.enter_context(StopSignal(device))

    def forward(batches: tuple[Batch, ...]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = task(batches[0].views[0])["loss"]
        return loss, {"loss": loss.detach()}

    def means(sums: dict[str, torch.Tensor]) -> dict[str, float]:
        return {"loss": sums["loss"].item() / sums["batches"].item(), "skipped": sums["skipped"].item()}

    if args.sched_on_updates:
        scheduler.step_update(progress.num_updates)
    elif progress.num_epochs:
        scheduler.step(progress.num_epochs)
    metrics = dict[str, float]()
    for epoch in range(progress.num_epochs, epochs):
        task.train()
        while progress.num_updates < (epoch + 1) * epoch_updates:
            batches = [next(steps) for _ in range(accum)]
            # All randomness of an update comes from its number, so a resumed run draws what the unbroken one would.
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
        metrics = {}
        if (epoch + 1) % args.val_interval == 0 or epoch + 1 == epochs:
            run.save_recovery(progress)  # a kill while evaluating must not cost the epoch
            metrics = held_out_loss(model, eval_loader, autocast)
            log.record({"epoch": epoch, "held_out_loss": metrics["loss"], "loss_of_zero": metrics["loss_of_zero"]})
        epoch_means = means(add_over_ranks(progress.epoch))
        scheduler.step(epoch + 1, metrics.get("loss"))
        progress.num_epochs, progress.epoch, progress.schedule = epoch + 1, {}, schedule_state(scheduler)
        log.epoch(epoch, epoch_means, metrics, mean_lr(optimizer))
        if run.saver:
            mean, std = data_config["mean"], data_config["std"]
            save_images(found.folder / PREDICTIONS, predicted_images(model, pictured, mean, std, autocast))
            run.saver.save_epoch(epoch, metrics, "loss")
    if not metrics:  # resumed at its end
        metrics = held_out_loss(model, eval_loader, autocast)

    # Report
    results = {
        "pretraining": {"directions": args.directions, "images": num_images, **metrics},
        "best": run.saver.read_best(progress.num_epochs - 1, metrics) if run.saver else {},
        "unreadable_images": {loader.source.describe(i): n for i, n in progress.unreadable.items()},
        "updates": progress.num_updates,
        "seconds": time.perf_counter() - log.start_s,
    }
    if run.saver:
        write_report(found.folder, results, log.records, PANELS, f"{title}, {num_images:,} images")
        best = results["best"]["loss"]
        log.say(f"held-out loss {metrics['loss']:.4f} (last), {best:.4f} (best); of zero {metrics['loss_of_zero']:.4f}")
        log.say(f"{found.folder}: {WEIGHTS} (best backbone), {METRICS}, {CURVES}, {PREDICTIONS}")
    return results


if __name__ == "__main__":
    setup_default_logging()
    logging.getLogger("timm.utils.checkpoint_saver").setLevel(logging.WARNING)  # lists every file at every save
    main()
