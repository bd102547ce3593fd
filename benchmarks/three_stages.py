"""The paper's three stages on Fashion-MNIST: no pretraining, ARM forward and ARM both, then few labels.

    OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python benchmarks/three_stages.py --fashion-mnist DIR
    python benchmarks/three_stages.py --summarise

DIR is torchvision's layout (see ssl_methods.py). Every stage is a run of train_arm.py or train_ssl.py. Stage 1 sees
the images of the split without their labels (600 updates of 32), stage 2 trains on the labels (800 of 16), stage 3 goes
on with pseudo-labels of the unlabelled images (200 of 16 and 48). ``none`` spends the updates of stage 1 on labels in
stage 2, so that it takes as many in all; ``none, short`` leaves them out. A linear probe on the mean of the patches'
tokens says what stage 1 alone has learned, beside that of a random backbone. Stage 3 starts from the teacher that
stage 2 ended with, and teachers at the end are what is compared. Seed 0 served to choose the numbers of updates and is
not used. Each finished run of all stages appends its rows to a CSV file and is not repeated; a killed one goes on where
its stages stopped. --summarise prints the tables as Markdown and draws the figure.
"""

import argparse
import csv
import io
import json
import shlex
import shutil
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts are no part of the package
import train_arm
import train_ssl
from semivim.data import ImageSource, LabelSplit, View, make_split, open_source
from semivim.flags.ssl_flags import make_split_kwargs
from semivim.layers import remove_middle
from semivim.runs.run_folder import LAST, METRICS, WEIGHTS
from semivim.utils.files import write_text

HERE = Path(__file__).parent
MEAN, STD = (0.286,), (0.353,)
MODEL = (
    "--model test_vim --img-size 28 --model-kwargs embed_dim=64 depth=2 patch_size=7 --in-chans 1 --mean 0.286 "
    "--std 0.353 -j 0 --checkpoint-hist 1 --val-interval 1000 --log-interval 100 --opt adamw --weight-decay 0.05 "
    "--sched-on-updates"
)
ARM = "--cluster 2 --dec-dim 64 --dec-depth 2 -b 32 -vb 500 --lr 2e-3 --epochs 5 --warmup-epochs 1 --scale 0.5 1"
LABELS = "-b 16 -vb 500 --unlabeled-ratio 3 --split-seed 42 --scale 0.7 1 --ratio 0.9 1.1 --color-jitter 0 --gp avg"
STAGE2 = f"{LABELS} --ssl-method supervised --model-ema-decay 0.99 --lr 2e-3 --warmup-epochs 1"
# A teacher that starts as the better model must not be overwritten by a warm-up.
STAGE3 = (
    f"{LABELS} --ssl-method ema-teacher --model-ema-decay 0.99 --no-model-ema-warmup "
    "--strong-aa rand-m6-mstd0.5-inc1 --strong-reprob 0.5 --lr 1e-3 --epochs 2 --warmup-epochs 1"
)
EPOCH = 100  # updates; only a unit of the schedules
UPDATES = {"stage 1": 6 * EPOCH, "stage 2": 8 * EPOCH, "stage 3": 2 * EPOCH}
CONDITIONS = {
    "balanced, 1 % of the labels": "--label-fraction 0.01",
    "long-tailed, 200 to 10 labels a class": "--imb-n1 200 --imb-factor-l 20 --imb-m1 2000 --imb-factor-u 20",
}
VARIANTS = ("none, short", "none", "ARM forward", "ARM both")
STAGES = ("probe", "stage 2", "stage 3")
KEY = ("condition", "variant", "seed")
COLUMNS = (*KEY, "stage", "top1", "balanced_acc", "worst_class_recall", "held_out_loss", "updates", "seconds")


def run(script: Any, flags: str, folder: Path, *words: str) -> dict[str, Any]:
    """Run a script, or read what a finished run left; an unfinished one goes on."""
    if not (folder / METRICS).exists():
        where = ["--output", str(folder.parent), "--experiment", folder.name, "--resume", "auto"]
        script.main([*shlex.split(f"{MODEL} {flags}"), "--train-batches-per-epoch", str(EPOCH), *where, *words])
    return json.loads((folder / METRICS).read_text())


def split_of(source: ImageSource, flags: str) -> LabelSplit:
    """The split that train_ssl.py draws."""
    args = train_ssl.parse_args(shlex.split(f"--dataset torch/fashion_mnist {MODEL} {flags} {LABELS}"))
    return make_split(source.labels, 10, **make_split_kwargs(args))


def write_images(source: ImageSource, positions: np.ndarray, folder: Path) -> None:
    """Write images as a folder without classes."""
    if folder.exists():
        return
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for position in positions.tolist():
        source.image(position).save(temporary / f"{position}.png")
    temporary.rename(folder)


@torch.inference_mode()
def features(model: torch.nn.Module, source: ImageSource, positions: np.ndarray) -> np.ndarray:
    """Mean of the patch tokens behind the final norm, ``(n, d)``."""
    view = View((1, 28, 28), MEAN, STD, is_training=False, crop_pct=1.0)
    found: list[Tensor] = []
    for part in np.array_split(positions, -(-len(positions) // 500)):
        pixels = view([source.image(i) for i in part.tolist()], [0] * len(part))
        tokens = model.forward_features(view.load(pixels, torch.device("cpu")))
        found.append(remove_middle(tokens)[0].mean(1))
    return torch.cat(found).numpy()


def probe(model: torch.nn.Module, source: ImageSource, val_source: ImageSource, split: LabelSplit) -> dict[str, float]:
    """Logistic regression on frozen features of the labelled images."""
    scale = StandardScaler()
    known = scale.fit_transform(features(model.eval(), source, split.labelled))
    classifier = LogisticRegression(C=0.1, max_iter=1000).fit(known, split.labels[split.labelled])
    guess = classifier.predict(scale.transform(features(model, val_source, np.arange(len(val_source)))))
    truth = val_source.labels
    recall = [100 * (guess[truth == c] == c).mean() for c in range(10)]
    return {
        "top1": 100 * float((guess == truth).mean()),
        "balanced_acc": 100 * float(balanced_accuracy_score(truth, guess)),
        "worst_class_recall": float(min(recall)),
    }


def all_stages(key: tuple[str, str, int], data_dir: str, output: Path) -> list[dict[str, Any]]:
    """Rows of one run: the probe of stage 1, stage 2 and stage 3."""
    condition, variant, seed = key
    start, split_flags = time.perf_counter(), f"{CONDITIONS[condition]} --fold {seed} --seed {seed}"
    source, val_source = (
        open_source("torch/fashion_mnist", data_dir, split=split) for split in ("train", "validation")
    )
    split = split_of(source, split_flags)
    place = output / f"{list(CONDITIONS).index(condition)}-{seed}"
    folder = place / variant.replace(" ", "-").replace(",", "")
    words, updates, pretrained = [], dict(UPDATES), {}
    if variant.startswith("ARM"):
        images = place / "images"
        write_images(source, np.union1d(split.labelled, split.unlabelled), images)
        directions = f"--directions {variant.removeprefix('ARM ')}"
        pretrained = run(
            train_arm, f"{ARM} {directions} --seed {seed}", folder / "stage1", "--unlabeled-dir", str(images)
        )
        words = ["--initial-checkpoint", str(folder / "stage1" / WEIGHTS)]
        backbone = timm.create_model(f"local-dir:{folder / 'stage1'}", pretrained=True)
    else:
        torch.manual_seed(seed)
        backbone = timm.create_model(
            "test_vim", num_classes=0, img_size=28, embed_dim=64, depth=2, patch_size=7, in_chans=1
        )
        updates["stage 1"] = 0
        updates["stage 2"] += UPDATES["stage 1"] if variant == "none" else 0
    data = f"--dataset torch/fashion_mnist {split_flags}"
    opened = ("--data-dir", data_dir)
    rows = [{"stage": "probe", **probe(backbone, source, val_source, split), "updates": updates["stage 1"]}]
    stage2 = run(
        train_ssl, f"{STAGE2} {data} --epochs {updates['stage 2'] // EPOCH}", folder / "stage2", *opened, *words
    )
    words = ["--initial-checkpoint", str(folder / "stage2" / LAST)]  # timm takes the teacher of a checkpoint
    stage3 = run(train_ssl, f"{STAGE3} {data}", folder / "stage3", *opened, *words)
    for stage, results in (("stage 2", stage2), ("stage 3", stage3)):
        rows.append({"stage": stage, **results["teacher"], "updates": updates[stage]})
    shared = dict(zip(KEY, key, strict=True)) | {"seconds": round(time.perf_counter() - start, 1)}
    held_out = pretrained.get("pretraining", {}).get("loss", "")
    return [row | shared | {"held_out_loss": held_out} for row in rows]


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of the runs so far, each with one for every stage."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def add_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the file again with more rows, at once: a kill leaves no part of a run in it."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows([*read_rows(path), *rows])
    write_text(path, text.getvalue())


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.1f} +- {statistics.stdev(values) if len(values) > 1 else 0.0:.1f}"


def values_of(rows: list[dict[str, str]], condition: str, variant: str, stage: str, metric: str) -> list[float]:
    """A metric of all seeds."""
    wanted = (condition, variant, stage)
    return [float(row[metric]) for row in rows if (row["condition"], row["variant"], row["stage"]) == wanted]


def summarise(rows: list[dict[str, str]], figure_path: Path) -> None:
    """Print a table for each condition and draw all seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(CONDITIONS), figsize=(5.0 * len(CONDITIONS), 3.4), sharey=True, squeeze=False)
    for axis, condition in zip(axes[0], CONDITIONS, strict=True):
        found = partial(values_of, rows, condition)
        seeds = max(len(found(variant, "stage 3", "top1")) for variant in VARIANTS)
        print(f"\n{condition}, {seeds} seeds; top-1 / balanced accuracy in %\n")
        print("| variant | " + " | ".join(STAGES) + " |\n|" + "---|" * (1 + len(STAGES)))
        for index, variant in enumerate(VARIANTS):
            if not found(variant, "stage 3", "top1"):
                continue
            pairs = ((found(variant, s, "top1"), found(variant, s, "balanced_acc")) for s in STAGES)
            print(f"| {variant} | " + " | ".join(f"{spread(a)} / {spread(b)}" for a, b in pairs) + " |")
            for place, stage in enumerate(STAGES):
                values = found(variant, stage, "balanced_acc")
                shift = place + 0.16 * (index - 1.5)
                label = variant if place == 0 and axis is axes[0, -1] else None
                axis.plot([shift] * len(values), values, "o", color=f"C{index}", label=label, markersize=4)
        axis.set_xticks(range(len(STAGES)), STAGES)
        axis.set_title(condition, fontsize="medium")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("balanced accuracy (%)")
    axes[0, -1].legend(fontsize="small")
    figure.tight_layout()
    figure_path.parent.mkdir(exist_ok=True)
    figure.savefig(figure_path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion-mnist", metavar="DIR", help="Fashion-MNIST in torchvision's layout")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS), choices=list(CONDITIONS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--output", type=Path, default=Path("output/three_stages"), help="folder of the runs")
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "three_stages.csv")
    parser.add_argument("--summarise", action="store_true", help="print the tables of the CSV file, run nothing")
    parser.add_argument("--figure", type=Path, default=HERE / "figures" / "three_stages.png")
    args = parser.parse_args()
    if args.summarise:
        summarise(read_rows(args.csv), args.figure)
        return
    if not args.fashion_mnist:
        parser.error("--fashion-mnist DIR is needed to run anything")
    torch.set_num_threads(1)
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    done = {tuple(row[name] for name in KEY) for row in read_rows(args.csv)}
    for seed in range(1, 1 + args.seeds):  # a seed of everything first, so that a stopped benchmark compares
        for condition in args.conditions:
            for variant in args.variants:
                if (condition, variant, str(seed)) in done:
                    continue
                rows = all_stages((condition, variant, seed), args.fashion_mnist, args.output)
                add_rows(args.csv, rows)
                print(f"{condition}, {variant}, seed {seed}: {rows[-1]['top1']:.1f} %, {rows[-1]['seconds']} s")


if __name__ == "__main__":
    main()
