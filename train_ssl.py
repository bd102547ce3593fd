#!/usr/bin/env python3
"""Semi-supervised training of a Vision Mamba with few labels (Semi-ViM, stage 3; ``supervised`` is its stage 2).

    python train_ssl.py                                   demo on scikit-learn's digits, 20 to 2 labels a class
    python train_ssl.py --data-dir DIR --label-fraction 0.1 --model semivim_small --img-size 224 --opt adamw --lr 5e-4
    torchrun --nproc-per-node 8 train_ssl.py ...          the same on 8 GPUs
    python train_ssl.py -c RUN/args.yaml --resume RUN/last.pth.tar

A run folder OUTPUT/EXPERIMENT gets args.yaml, labelled.txt and unlabelled.txt (the split), summary.csv, checkpoints,
metrics.jsonl, metrics.json, curves.png, and as model.safetensors with a timm config.json the best model: the better of
student and teacher by --eval-metric, at its best epoch.
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
from timm.data import Mixup
from timm.utils import is_primary, random_seed, setup_default_logging

import semivim  # noqa: F401  registers the models
from semivim.data import (
    Batch,
    describe_duplicates,
    save_split,
)
from semivim.flags.data_flags import (
    add_augmentation_flags,
    add_dataset_flags,
    mixes,
    mixup_kwargs,
)
from semivim.flags.imbalance_flags import PRIOR_FLAGS, add_imbalance_flags, rule_kwargs
from semivim.flags.loaders import create_loaders
from semivim.flags.model_flags import (
    add_device_flags,
    add_ema_flags,
    add_model_flags,
    classifier_kwargs,
    create_model,
    mixed_precision,
    open_device,
)
from semivim.flags.open_data import open_data
from semivim.flags.parser import Parser, flag, parse_flags
from semivim.flags.ssl_flags import (
    SPLIT_FLAGS,
    add_semi_supervised_flags,
    ssmixup_kwargs,
    task_kwargs,
    teacher_kwargs,
)
from semivim.flags.train_flags import (
    OPTIMIZER_OPTIONS,
    add_misc_flags,
    add_optimizer_flags,
    add_schedule_flags,
    clip_kwargs,
    create_optimizer,
)
from semivim.runs.checkpoint import better_model, save_best, schedule_state
from semivim.runs.open_run import find_run, open_run
from semivim.runs.optimizer_step import mean_lr, optimizer_step, update_seed
from semivim.runs.progress import Progress, add_over_ranks
from semivim.runs.report import Panel, results_table, write_report
from semivim.runs.run_folder import CURVES, METRICS, WEIGHTS
from semivim.task.posthoc import debiased_copies, refuse_second_removal, start_adjusted
from semivim.task.pseudo_label_rule import PseudoLabelRule
from semivim.task.semi_supervised import SemiSupervisedTask
from semivim.task.ssl_figures import (
    batch_figures,
    interval_means,
    prior_classes,
    pseudo_label_figures,
    pseudo_label_summary,
    task_figures,
)
from semivim.task.tune_scope import limit_training
from semivim.utils.metrics import describe_groups, evaluate, shot_groups
from semivim.utils.preprocessing import resolve_preprocessing
from semivim.utils.stop_signal import StopSignal
from semivim.utils.user_error import UserError, user_errors_end_the_program

# What a resumed run may not change, with the flags that set it.
FIXED_FLAGS = (*SPLIT_FLAGS, *PRIOR_FLAGS, "ssl_method", "unlabeled_ratio", "img_size", "input_size")
FIXED = {name: flag(name) for name in FIXED_FLAGS} | {
    "labelled_per_update": "--batch-size x --grad-accum-steps x processes",
    "updates_per_epoch": "--train-batches-per-epoch",
}
FIXED_OPTIMIZER = {name: flag(name) for name in (*OPTIMIZER_OPTIONS, "tune_scope")}
TRAIN_COLUMNS = ("loss_labelled", "loss_unlabelled", "kept_share", "alpha")
EVAL_COLUMNS = ("student_top1", "top1", "top5", "balanced_acc", "worst_class_recall")
PANELS = (
    Panel("loss", ("loss_labelled", "loss_unlabelled")),
    Panel("pseudo-labels", ("kept_share", "pseudo_accuracy")),
    Panel("alpha", ("alpha",)),
    Panel("V and guard rate", ("v", "guard_rate"), "symlog"),
)

LONG_TAIL = {"imb_n1": 20, "imb_factor_l": 10.0, "imb_m1": 100, "imb_factor_u": 10.0}
LONG_TAIL_RULES = {"debias_pseudo": 1.0, "posthoc_debias": "unlabeled"}
# What `python train_ssl.py` runs: every value can be overridden on the command line.
DEMO: dict[str, Any] = {
    "dataset": "embedded/digits", "model": "semivim_pico", "in_chans": 1, "mean": [0.5], "std": [0.5],
    **LONG_TAIL, **LONG_TAIL_RULES, "ssl_method": "ema-teacher", "eval_metric": "balanced_acc",
    "batch_size": 16, "unlabeled_ratio": 3,
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
    add_dataset_flags(parser)
    add_model_flags(parser, model="semivim_tiny")
    add_device_flags(parser)
    add_optimizer_flags(parser)
    add_schedule_flags(parser)
    add_augmentation_flags(parser)
    add_ema_flags(parser)
    add_misc_flags(parser)
    add_semi_supervised_flags(parser)
    add_imbalance_flags(parser)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse flags and ``-c`` file; without a dataset the demo's values become the defaults."""
    parser = build_parser()
    args = parse_flags(parser, argv)
    if not (args.dataset or args.data_dir):
        other_split = args.label_fraction or args.labels_per_class or args.labeled_list
        against = {  # demo values that make way for what is given
            **dict.fromkeys((*LONG_TAIL, *LONG_TAIL_RULES), other_split),
            "debias_pseudo": other_split or args.pseudo_prior != "none",
            "lr": args.lr_base != parser.get_default("lr_base"),
            "sched_on_updates": args.sched == "plateau",
        }
        parser = build_parser()
        args = parse_flags(parser, argv, {key: DEMO[key] for key in DEMO if not against.get(key)})
    parser.check(args)
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train; returns what metrics.json holds."""
    args = parse_args(argv)
    with user_errors_end_the_program("train_ssl.py", args.debug), ExitStack() as stack:
        return train(args, stack)


# C901, PLR0915: a script is read from top to bottom
def train(args: argparse.Namespace, stack: ExitStack) -> dict[str, Any]:  # noqa: C901, PLR0915
    """Set up data, student, teacher and optimizer, train, evaluate and report; ``stack`` ends with the run."""
    found = find_run(args.output, args.experiment, args.resume, f"{args.model}-{args.ssl_method}")
    config = {k: v for k, v in vars(args).items() if k != "resume"}
    device = open_device(args)
    if args.distributed:
        stack.callback(torch.distributed.destroy_process_group)  # gloo's threads abort a process that just ends
    random_seed(args.seed)  # alike on all ranks, which start from one student and one teacher

    # Data
    source, val_source, split = open_data(args, found.path.parent if found.path else None)
    num_classes = split.num_classes
    used = split.labels[np.union1d(split.labelled, split.unlabelled)]
    counts = np.bincount(used[used >= 0], minlength=num_classes).tolist()  # for the many, medium and few groups

    # Student
    model = create_model(args, num_classes, **classifier_kwargs(args), **ssmixup_kwargs(args)).to(device)
    if trained_by := getattr(model, "trained_by", None):
        raise UserError(f"--model {args.model} has losses of its own: train it by {trained_by}")
    limit_training(model, args.tune_scope)
    refuse_second_removal(args.initial_checkpoint, args.posthoc_debias)
    data_config = resolve_preprocessing(model, f"--model {args.model}", vars(args))
    ratio = 0 if args.ssl_method == "supervised" else args.unlabeled_ratio
    loader, eval_loader, sample = create_loaders(
        args, source, val_source, split, data_config, ratio * args.batch_size, device
    )
    mixup = Mixup(**mixup_kwargs(args), num_classes=num_classes) if mixes(args) else None

    # Optimizer, schedule; an epoch is one pass over the unlabelled images, whatever the method
    accum = args.grad_accum_steps
    per_update = args.batch_size * accum * args.world_size
    num_unlabelled = len(split.unlabelled)
    one_pass = num_unlabelled // args.unlabeled_ratio if num_unlabelled else len(split.labelled)  # in labelled images
    epoch_updates = args.train_batches_per_epoch or max(1, one_pass // per_update)
    sizes = {"labelled_per_update": per_update, "updates_per_epoch": epoch_updates}
    found.check_unchanged(config | sizes, FIXED if args.no_resume_opt else FIXED | FIXED_OPTIMIZER)
    optimizer, scheduler, epochs = create_optimizer(args, model, epoch_updates, per_update)
    autocast, scaler = mixed_precision(args, device)
    clip = clip_kwargs(args)

    # Task and teacher
    progress = Progress()
    rule = PseudoLabelRule(
        num_classes, split.labels_per_class.tolist(), **rule_kwargs(args, epochs * epoch_updates), device=device
    )
    if args.logit_adjust_tau:
        start_adjusted(model, args.initial_checkpoint, rule.labelled_prior, args.logit_adjust_tau)
    task = SemiSupervisedTask(model, num_classes, rule=rule, **task_kwargs(args), progress=progress, device=device)
    task.setup_ema(**teacher_kwargs(args))

    # Resume
    found.restore(progress, task, None if args.no_resume_opt else optimizer, scheduler, scaler)
    if args.start_epoch is not None:
        progress.restart(args.start_epoch, epoch_updates)
    if args.ssl_method == "lyapema":
        task.trainable_module_ema.attach(optimizer, model)
    if args.torchcompile:
        task.compile(args.torchcompile, args.torchcompile_mode)
    if args.distributed:
        task.prepare_distributed(device_ids=[device] if device.type == "cuda" else None)

    # Output
    models = {"teacher": task.trainable_module_ema.module, "student": model}
    run = stack.enter_context(
        open_run(
            found,
            progress,
            primary=is_primary(args),
            config=config,
            sizes=sizes,
            total_updates=epochs * epoch_updates,
            train_columns=TRAIN_COLUMNS,
            eval_columns=EVAL_COLUMNS,
            log_wandb=args.log_wandb,
            wandb_project=args.wandb_project,
            export=partial(save_best, models, found.folder, source.class_names, data_config, source.rules),
            model=model,
            optimizer=optimizer,
            amp_scaler=scaler,
            max_history=args.checkpoint_hist,
            task=task,
        )
    )
    log, title = run.log, f"{args.model}, {args.ssl_method}, pseudo-mixup {args.pseudo_mixup}"
    if run.saver:
        save_split(split, found.folder, source.names)
        loader.unreadable.update(progress.unreadable)  # rank 0 keeps the earlier counts of all
        log.say(f"{found.folder}: {title}, {device}")
        notes = [split.report(), describe_groups(counts), describe_duplicates(source, val_source)]
        log.say("\n".join(filter(None, notes)))

    # Train
    steps = loader.steps(progress.num_updates * accum)
    stack.callback(steps.close)  # ends loader processes
    stop = stack.enter_context(StopSignal(device))
    ramp_steps = args.warmup_epochs * epoch_updates

    def forward(batches: tuple[Batch, ...]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        (image,), label = batches[0]
        (weak, strong), hidden_label = batches[1] if ratio else ((None, None), None)
        if mixup is not None:
            image, label = mixup(image, label)
        result = task(image, label, weak, strong, progress.ramp(ramp_steps))
        return result["loss"], batch_figures(result, hidden_label)

    means = partial(interval_means, groups=shot_groups(counts), labelled_prior=rule.labelled_prior)

    def measure() -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        copies = debiased_copies(models, args.posthoc_debias, args.posthoc_tau, rule.labelled_prior, sample, autocast)
        models.update(copies)  # where there are any, one of them is saved
        evaluated = {"student": task.get_eval_model(), "teacher": task.get_eval_model(ema=True)} | copies
        metrics = {
            name: evaluate(m, eval_loader, num_classes, device, autocast, train_counts=counts)
            for name, m in evaluated.items()
        }
        candidates = reversed(copies or metrics)  # of equals the teacher
        return metrics, better_model({name: metrics[name] for name in candidates}, args.eval_metric)

    if args.sched_on_updates:
        scheduler.step_update(progress.num_updates)
    elif progress.num_epochs:  # plateau would take epoch 0 for warm-up
        scheduler.step(progress.num_epochs)
    measured, better = dict[str, dict[str, Any]](), dict[str, Any]()
    shown_metrics = dict.fromkeys(("top1", args.eval_metric))
    for epoch in range(progress.num_epochs, epochs):
        task.train()
        if mixup is not None and args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
            mixup.mixup_enabled = False
        while progress.num_updates < (epoch + 1) * epoch_updates:
            batches = [next(steps) for _ in range(accum)]
            # All randomness of an update comes from its number, so a resumed run draws what the unbroken one would.
            random_seed(update_seed(args.seed, progress.num_updates, args.rank))
            step = optimizer_step(task, batches, forward, optimizer, autocast=autocast, scaler=scaler, clip=clip)
            run.step_done(step.taken, progress.num_updates)
            progress.add(step.figures)
            if step.taken:
                task.commit(step.figures)
                task.update_ema(step=progress.num_updates)
            if args.sched_on_updates:
                scheduler.step_update(progress.num_updates)
            log.step((1 + ratio) * per_update)
            if progress.num_updates % args.log_interval == 0:
                log.record({"lr": mean_lr(optimizer), **means(add_over_ranks(progress.interval)), **task_figures(task)})
                progress.interval = {}
            if args.recovery_interval and progress.num_updates % args.recovery_interval == 0:
                progress.gather(loader.unreadable)
                run.save_recovery(progress)
            if signal_number := stop.asked():
                progress.gather(loader.unreadable)
                run.stop(progress, signal_number)

        progress.gather(loader.unreadable)
        measured, better = {}, {}
        epoch_sums = add_over_ranks(progress.epoch)
        epoch_means = means(epoch_sums) | task_figures(task)
        if (epoch + 1) % args.val_interval == 0 or epoch + 1 == epochs:
            run.save_recovery(progress)  # a kill while evaluating must not cost the epoch
            measured, better = measure()
            shown = {f"{who}_{name}": metrics[name] for name in shown_metrics for who, metrics in measured.items()}
            labelling = pseudo_label_figures(epoch_sums, epoch_means)
            ends = prior_classes(rule.state.get("prior"), source.class_names)
            log.record({"epoch": epoch, **shown, **ends, "pseudo_labels": labelling})
        log.say_once(pseudo_label_summary(epoch_sums, source.class_names).get("fault"))
        student, teacher = measured.get("student", {}), measured.get("teacher", {})
        scheduler.step(epoch + 1, better.get(args.eval_metric))
        progress.num_epochs, progress.epoch, progress.schedule = epoch + 1, {}, schedule_state(scheduler)
        log.epoch(epoch, epoch_means, {"student_top1": student.get("top1"), **teacher}, mean_lr(optimizer))
        if run.saver and run.saver.save_epoch(epoch, better, args.eval_metric):
            log.say(
                f"best so far: {better['model']} of epoch {epoch}, {args.eval_metric} {better[args.eval_metric]:.2f}"
            )
    if not measured:  # resumed at its end
        measured, better = measure()

    # Report
    results = {
        **measured,
        "best": run.saver.read_best(progress.num_epochs - 1, better) if run.saver else {},
        "class_names": source.class_names,
        "split": {"sha256": split.sha256, "labels_per_class": split.labels_per_class.tolist()}
        | {"num_labelled": len(split.labelled), "num_unlabelled": len(split.unlabelled)},
        "pseudo_labels": pseudo_label_summary(add_over_ranks(progress.run), source.class_names)
        | next((r["pseudo_labels"] for r in reversed(log.records) if "pseudo_labels" in r), {}),
        "unreadable_images": {source.describe(i): n for i, n in progress.unreadable.items()},
        "updates": progress.num_updates,
        "seconds": time.perf_counter() - log.start_s,
    }
    if run.saver:
        shown_panel = Panel(f"{args.eval_metric} (%)", [f"{who}_{args.eval_metric}" for who in measured])
        panels = (PANELS[0], shown_panel, *PANELS[1:])
        write_report(found.folder, results, log.records, panels, f"{title}, {len(split.labelled)} labels")
        log.say(results_table(measured, source.class_names, results["pseudo_labels"]))
        best = results["best"]
        last = ", ".join(f"{name} {metrics[args.eval_metric]:.2f}" for name, metrics in measured.items())
        log.say(f"{args.eval_metric}: {last} (last epoch), best {best[args.eval_metric]:.2f}")
        log.say(f"{found.folder}: {WEIGHTS} (best: {best['model']} of epoch {best['epoch']}), {METRICS}, {CURVES}")
    return results


if __name__ == "__main__":
    setup_default_logging()
    logging.getLogger("timm.utils.checkpoint_saver").setLevel(logging.WARNING)  # lists every file at every save
    main()
