"""A learning-rate spike in semi-supervised training of a small Vim: plain EMA teachers beside LyapEMA.

Usage: OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python benchmarks/lr_spike.py

scikit-learn's digits, 4 labels a class, a Vim of two blocks and 30 thousand parameters. Every run trains on the labels
alone, then on pseudo-labels of its teacher too; in the middle of that the learning rate is 50 times too high for 20
steps. Prints the teachers' accuracy over the seeds, with the spike and without it, and draws
benchmarks/figures/lr_spike.png. Runs go side by side in two processes of one thread each.
"""

import argparse
import multiprocessing
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import timm
import torch

import semivim  # noqa: F401  registers the models
from semivim.data.evaluation import EvaluationLoader
from semivim.data.label_split import make_split
from semivim.data.sources import open_source
from semivim.data.streams import ImageStream, StreamLoader
from semivim.data.views import View
from semivim.task.semi_supervised import SemiSupervisedTask

# Teacher -> method of the task, arguments of the average. The second has LyapEMA's own warm-up but no guard.
TEACHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "EMA 0.99": ("ema-teacher", {"decay": 0.99}),
    "EMA 0.9999, warm-up": ("ema-teacher", {"decay": 0.9999, "use_warmup": True}),
    "LyapEMA": ("lyapema", {}),
    "Algorithm 1 as printed": ("lyapema", {"mode": "literal"}),
}
SPIKE = 50.0
SPIKE_STEPS = 20
CALM_STEPS = 100


class Trace(NamedTuple):
    """One run: top-1 in percent and V = 0.5 ||S - T||^2 at steps counted from the first pseudo-label, guarded steps."""

    steps: list[int]
    top1: list[float]
    v: list[float]
    guarded: list[int]

    def summary(self, spike_step: int) -> list[float]:
        """Accuracy before the spike, lowest and last after it."""
        at = self.steps.index(spike_step)
        return [self.top1[at], min(self.top1[at:]), self.top1[-1]]


def load(seed: int, batch_size: int) -> tuple[StreamLoader, torch.Tensor, torch.Tensor]:
    """Batches of labelled and three times as many unlabelled digits, and the 500 test images with their labels."""
    source = open_source("embedded/digits", split="train")
    split = make_split(source.labels, 10, per_class=4, seed=seed)
    view = partial(View, (1, 32, 32), (0.5,), (0.5,))
    train_view = partial(view, scale=(0.6, 1.0), hflip=0.0, color_jitter=None)
    strong_view = train_view(auto_augment="rand-m5-mstd0.5-inc1", re_prob=0.25)
    stream = partial(ImageStream, source, labels=split.labels, seed=seed)
    loader = StreamLoader(
        [
            stream(split.labelled, [train_view()], batch_size),
            stream(split.unlabelled, [train_view(), strong_view], 3 * batch_size, stream=1),
        ]
    )
    test = open_source("embedded/digits", split="validation")
    image, label = next(iter(EvaluationLoader(test, view(is_training=False, crop_pct=1.0), len(test))))
    return loader, image, label


def run(
    teacher: str,
    spike: float,
    seed: int,
    *,
    lr: float = 2e-3,
    batch_size: int = 16,
    burnin_steps: int = 150,
    calm_steps: int = CALM_STEPS,
    after_steps: int = 130,
    log_interval: int = 10,
) -> Trace:
    """Train on the labels, then with the teacher; the learning rate is ``spike * lr`` for SPIKE_STEPS of the latter."""
    torch.manual_seed(seed)
    loader, image, label = load(seed, batch_size)
    model = timm.create_model("test_vim", num_classes=10, in_chans=1, depth=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    method, ema_args = TEACHERS[teacher]
    supervised, task = SemiSupervisedTask(model, 10, method="supervised"), SemiSupervisedTask(model, 10, method=method)
    batches = loader.steps()

    def step(task: SemiSupervisedTask) -> None:
        labelled, unlabelled = next(batches)
        task.train()
        task(*labelled.views, labelled.label, *unlabelled.views)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(burnin_steps):
        step(supervised)
    ema = task.setup_ema(**ema_args)
    if method == "lyapema":
        ema.attach(optimizer, model)
    trace = Trace([], [], [], [])
    guarded = 0
    for i in range(calm_steps + SPIKE_STEPS + after_steps + 1):
        if i % log_interval == 0:
            with torch.no_grad():
                top1 = 100 * (ema(image).argmax(-1) == label).float().mean().item()
            pairs = zip(model.parameters(), ema.module.parameters(), strict=True)
            v = 0.5 * sum((s.detach() - t).square().sum().item() for s, t in pairs)
            for values, value in zip(trace, (i, top1, v, guarded), strict=True):
                values.append(value)
        factor = spike if calm_steps <= i < calm_steps + SPIKE_STEPS else 1.0
        for group in optimizer.param_groups:
            group["lr"] = factor * lr * group.get("lr_scale", 1.0)
        step(task)
        task.update_ema(i + 1)
        guarded += task.lyap_stats is not None and task.lyap_stats.violated
    return trace


def _run(job: tuple[str, float, int]) -> Trace:
    torch.set_num_threads(1)
    return run(*job)


def draw(traces: dict[tuple[str, float, int], Trace], seeds: range, path: Path) -> None:
    """Draw the spiked runs: accuracy and V over the steps, one line a seed."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 5.2), sharex=True, height_ratios=[3, 2])
    for i, teacher in enumerate(TEACHERS):
        for seed in seeds:
            trace = traces[teacher, SPIKE, seed]
            style = {"color": f"C{i}", "linewidth": 1.2, "alpha": 0.85, "label": teacher if seed == seeds[0] else None}
            above.plot(trace.steps, trace.top1, **style)
            below.plot(trace.steps[1:], trace.v[1:], **style)
    for axis in (above, below):
        axis.axvspan(CALM_STEPS, CALM_STEPS + SPIKE_STEPS, color="0.85", zorder=0)
        axis.grid(color="0.92")
    above.set(
        ylabel="teacher top-1, %", ylim=(0, 100), title=f"Learning rate x{SPIKE:.0f} for {SPIKE_STEPS} steps (grey)"
    )
    above.legend(loc="lower left", fontsize=8)
    below.set(ylabel="V = ½‖S − T‖²", yscale="log", xlabel="step after the first pseudo-label")
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (%(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="runs side by side (%(default)s)")
    args = parser.parse_args()
    start, seeds = time.perf_counter(), range(args.seeds)
    jobs = [(teacher, spike, seed) for seed in seeds for spike in (SPIKE, 1.0) for teacher in TEACHERS]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        traces = dict(zip(jobs, pool.imap(_run, jobs), strict=True))

    print(f"teacher top-1 on 500 digits, {args.seeds} seeds: mean [worst]; {time.perf_counter() - start:.0f} s")
    columns = ("before spike", "lowest after", "end", "end, no spike", "V fails, no spike")
    print(" " * 24 + "".join(f"{column:>18}" for column in columns))
    for teacher in TEACHERS:
        spiked = np.array([traces[teacher, SPIKE, seed].summary(CALM_STEPS) for seed in seeds])
        calm = np.array([traces[teacher, 1.0, seed].top1[-1] for seed in seeds])
        cells = [f"{column.mean():.1f} [{column.min():.1f}]" for column in (*spiked.T, calm)]
        guarded = np.mean([traces[teacher, 1.0, seed].guarded[-1] for seed in seeds])
        cells.append(f"{guarded:.1f} steps")
        print(f"{teacher:24}" + "".join(f"{cell:>18}" for cell in cells))
    draw(traces, seeds, Path(__file__).parent / "figures" / "lr_spike.png")


if __name__ == "__main__":
    main()
