"""What helps rare classes: every method from the same labels, the same second stage and the same views.

    OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python benchmarks/rare_classes.py --fashion-mnist DIR --openclipart DIR
    python benchmarks/rare_classes_report.py      prints the tables as Markdown and draws the figure

DIR of Fashion-MNIST is torchvision's layout (see ssl_methods.py), that of openclipart what openclipart.py made. A run
is the product's own task, split, views, optimizer step and flags in one process, without checkpoints: 1,000 updates on
the labels (shared by all methods of a fold), then 500 updates of the method from that teacher. Each run appends its
rows to a CSV file as it ends; runs that are there are not repeated, so a killed benchmark goes on where it was. Folds 0
to 2 served to choose the methods and are not used.
"""

import argparse
import csv
import io
import os
import shlex
import statistics
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.utils import random_seed
from torch import Tensor, nn
from torchmetrics.classification import MulticlassCalibrationError

sys.path.insert(0, str(Path(__file__).parent.parent))  # train_ssl.py is no part of the package
import train_ssl
from semivim.data import ImageSource, LabelSplit, make_split, open_source
from semivim.flags.imbalance_flags import rule_kwargs
from semivim.flags.loaders import create_loaders
from semivim.flags.model_flags import create_model
from semivim.flags.ssl_flags import make_split_kwargs, ssmixup_kwargs, task_kwargs, teacher_kwargs
from semivim.flags.train_flags import clip_kwargs, create_optimizer
from semivim.runs.checkpoint import save_model
from semivim.runs.optimizer_step import optimizer_step, update_seed
from semivim.runs.progress import add_up
from semivim.task.posthoc import mean_prediction, start_adjusted
from semivim.task.pseudo_label_rule import PseudoLabelRule
from semivim.task.semi_supervised import SemiSupervisedTask
from semivim.task.ssl_figures import batch_figures, interval_means, pseudo_label_figures
from semivim.utils.metrics import ClassificationMetrics
from semivim.utils.preprocessing import resolve_preprocessing

HERE = Path(__file__).parent
CPU = torch.device("cpu")
COMMON = (
    "--split-seed 42 -b 16 -vb 500 --unlabeled-ratio 3 --opt adamw --weight-decay 0.05 --sched-on-updates "
    "--model-ema-decay 0.99 --train-batches-per-epoch 50 -j 0"
)
VIEWS = "--scale 0.7 1 --ratio 0.9 1.1 --color-jitter 0"
STRONG_VIEW = "--strong-aa rand-m6-mstd0.5-inc1 --strong-reprob 0.5"
STAGE2 = "--ssl-method supervised --lr 2e-3 --epochs 20 --warmup-epochs 2"
# A teacher that starts as the better model must not be overwritten by a warm-up.
STAGE3 = "--no-model-ema-warmup --lr 1e-3 --epochs 10 --warmup-epochs 1"
METHODS = {
    "supervised": "--ssl-method supervised",
    "supervised + adjusted loss": "--ssl-method supervised --logit-adjust-tau 1",
    "FixMatch": "--ssl-method fixmatch",
    "EMA teacher": "--ssl-method ema-teacher",
    "LyapEMA": "--ssl-method lyapema --lyap-min-decay 0.9 --model-ema-decay 0.999",
    "EMA + debiased pseudo-labels (D1)": "--ssl-method ema-teacher --debias-pseudo 1",
    "EMA + adjusted loss, estimated prior (D2)": (
        "--ssl-method ema-teacher --logit-adjust-tau 1 --pseudo-prior estimated"
    ),
    "EMA + SSMixup": "--ssl-method ema-teacher --pseudo-mixup ss",
    "EMA + ProbMixup": "--ssl-method ema-teacher --pseudo-mixup prob",
    "EMA + FreeMatch": "--ssl-method ema-teacher --threshold-mode freematch",
    "EMA + SoftMatch": "--ssl-method ema-teacher --threshold-mode softmatch",
}
MAIN = [name for name in list(METHODS)[:7] if name != "supervised + adjusted loss"]
REST = [name for name in METHODS if name not in MAIN]
SHORT = ["supervised", "EMA teacher", *(name for name in MAIN if "(D" in name)]
FASHION = "--dataset torch/fashion_mnist --in-chans 1 --mean 0.286 --std 0.353"
MODELS = {  # flags for Fashion-MNIST; the second and third take the Vim's time for a step (--time-models)
    "vim": "--model test_vim --img-size 28 --model-kwargs embed_dim=64 depth=2 patch_size=7",
    "vit": (
        "--model vit_tiny_patch16_224 --img-size 28 --model-kwargs "
        "embed_dim=64 depth=4 num_heads=4 mlp_ratio=3 patch_size=7"
    ),
    "resnet": "--model test_resnet --input-size 1 28 28",
    "pico": "--model semivim_pico --input-size 1 32 32",
}
CLIPART_MODEL = "--model test_vim --img-size 64 --model-kwargs embed_dim=64 depth=2 patch_size=8"


class Condition(NamedTuple):
    """A data set with its labels: ``flags`` of the split; ``longer`` stands behind those of both stages and wins."""

    name: str
    dataset: str
    flags: str
    longer: str = ""


def long_tail(ratio: int, n1: int, reverse: bool) -> Condition:
    """Fashion-MNIST with ``n1`` to ``n1 / ratio`` labels and 2,000 to 2,000 / ratio unlabelled images a class."""
    order = "reversed" if reverse else "same order"
    flags = f"--imb-n1 {n1} --imb-factor-l {ratio} --imb-m1 2000 --imb-factor-u {-ratio if reverse else ratio}"
    return Condition(f"Fashion-MNIST {ratio}:1, {n1} labels of the largest class, {order}", "fashion", flags)


LONGER = "--epochs 40 --warmup-epochs 4"  # 2,000 updates
CLIPART_LONGER = Condition(
    "openclipart, 2,000 updates in both stages, threshold 0.5",
    "openclipart",
    "--label-fraction 0.2",
    f"{LONGER} --threshold 0.5",
)
CLIPART = Condition("openclipart, a fifth of each class labelled", "openclipart", "--label-fraction 0.2")
# Name -> condition, model, methods; the most telling first.
BLOCKS: dict[str, tuple[Condition, str, list[str]]] = {
    "20-50": (long_tail(20, 50, False), "vim", MAIN),
    "20-200": (long_tail(20, 200, False), "vim", MAIN),
    "openclipart": (CLIPART, "vim", [*SHORT, "EMA + FreeMatch"]),
    "openclipart-longer": (CLIPART_LONGER, "vim", SHORT[:3]),
    "20-50-rest": (long_tail(20, 50, False), "vim", REST),
    "20-50-vit": (long_tail(20, 50, False), "vit", SHORT),
    "20-50-resnet": (long_tail(20, 50, False), "resnet", SHORT),
    "20-50-reversed": (long_tail(20, 50, True), "vim", SHORT),
    "100-200": (long_tail(100, 200, False), "vim", SHORT),
    "20-200-reversed": (long_tail(20, 200, True), "vim", SHORT),
    "100-100": (long_tail(100, 100, False), "vim", SHORT),  # with 50 the rarest classes would have no label
    "20-200-rest": (long_tail(20, 200, False), "vim", REST),
    "100-200-reversed": (long_tail(100, 200, True), "vim", SHORT),
    "100-100-reversed": (long_tail(100, 100, True), "vim", SHORT),
    "20-50-reversed-rest": (long_tail(20, 50, True), "vim", REST),
    "100-200-rest": (long_tail(100, 200, False), "vim", REST),
    # Not run so far: hours.
    "20-200-pico": (long_tail(20, 200, False), "pico", SHORT),
}
METRICS = ("balanced_acc", "top1", "many", "medium", "few", "worst_class_recall", "geometric_mean", "calibration_error")
KEY = ("condition", "model", "method", "fold")
COLUMNS = (
    *KEY, "who", "posthoc", *METRICS, "recall", "pseudo_recall", "pseudo_precision", "kept_share", "pseudo_accuracy",
    "updates", "seconds",
)  # fmt: skip
ROWS_OF_A_RUN = 6  # student and teacher, without a prior removed, with the labels', with the mean prediction's


class Trained(NamedTuple):
    """What a stage leaves."""

    models: dict[str, nn.Module]
    config: dict[str, Any]  # preprocessing
    sums: dict[str, Tensor]  # figures of the second half of the updates
    args: argparse.Namespace
    updates: int
    sample: Any  # gives a sample of the unlabelled images


@cache
def load(dataset: str, folder: str) -> tuple[ImageSource, ImageSource]:
    """Training and validation images, decoded once."""
    options = {"dataset": "torch/fashion_mnist"} if dataset == "fashion" else {"dataset": ""}

    def decoded(split: str) -> ImageSource:
        source = open_source(data_dir=folder, split=split, **options)
        images = [source.image(i) for i in range(len(source))]
        return ImageSource(images.__getitem__, source.labels, source.class_names)

    return decoded("train"), decoded("validation")


def flags_of(condition: Condition, model: str, fold: int, stage: str) -> list[str]:
    """Words of the command line."""
    data = f"{FASHION} {MODELS[model]}" if condition.dataset == "fashion" else f"--data-dir . {CLIPART_MODEL}"
    longer = LONGER if model == "pico" else condition.longer
    text = f"{data} {condition.flags} {COMMON} {VIEWS} {stage} {longer} --seed {fold} --fold {fold}"
    return shlex.split(text)


def train(words: list[str], data: tuple[ImageSource, ImageSource], split: LabelSplit) -> Trained:
    """Train as train_ssl.py does, without its run folder."""
    args = train_ssl.parse_args(words)
    args.rank, args.world_size, args.distributed, args.device = 0, 1, False, "cpu"
    random_seed(args.seed)
    model = create_model(args, split.num_classes, **ssmixup_kwargs(args))
    config = resolve_preprocessing(model, f"--model {args.model}", vars(args))
    ratio = 0 if args.ssl_method == "supervised" else args.unlabeled_ratio
    loader, _, sample = create_loaders(args, *data, split, config, ratio * args.batch_size, CPU)
    epoch_updates = args.train_batches_per_epoch
    optimizer, scheduler, epochs = create_optimizer(args, model, epoch_updates, args.batch_size)
    updates = epochs * epoch_updates
    rule = PseudoLabelRule(split.num_classes, split.labels_per_class.tolist(), **rule_kwargs(args, updates))
    if args.logit_adjust_tau:
        start_adjusted(model, args.initial_checkpoint, rule.labelled_prior, args.logit_adjust_tau)
    task = SemiSupervisedTask(model, split.num_classes, rule=rule, **task_kwargs(args))
    ema = task.setup_ema(**teacher_kwargs(args))
    if args.ssl_method == "lyapema":
        ema.attach(optimizer, model)
    clip, steps, sums = clip_kwargs(args), loader.steps(), dict[str, Tensor]()

    def forward(batches: tuple) -> tuple[Tensor, dict[str, Tensor]]:
        (image,), label = batches[0]
        (weak, strong), hidden = batches[1] if ratio else ((None, None), None)
        ramp = min(1.0, (update + 1) / (args.warmup_epochs * epoch_updates))
        result = task(image, label, weak, strong, ramp)
        return result["loss"], batch_figures(result, hidden)

    task.train()
    scheduler.step_update(0)
    for update in range(updates):
        batches = [next(steps)]
        random_seed(update_seed(args.seed, update, 0))
        step = optimizer_step(task, batches, forward, optimizer, autocast=nullcontext, scaler=None, clip=clip)
        if step.taken:
            task.commit(step.figures)
            task.update_ema(update + 1)
        scheduler.step_update(update + 1)
        if 2 * update >= updates:
            add_up(sums, step.figures)
    steps.close()
    return Trained({"student": model, "teacher": ema.module}, config, sums, args, updates, sample)


def second_stage(condition: Condition, model: str, fold: int, data: Any, split: LabelSplit, output: Path) -> Path:
    """Teacher of the labels alone, trained once for all methods of a fold; the path of its weights."""
    name = f"{condition.name}-{model}-{fold}".replace(" ", "_").replace(":", "_").replace(",", "")
    folder = output / name
    if not (folder / "config.json").exists():  # it is written last
        folder.mkdir(parents=True, exist_ok=True)
        trained = train(flags_of(condition, model, fold, STAGE2), data, split)
        save_model(trained.models["teacher"], folder, data_config=trained.config)
    return folder / "model.safetensors"


@torch.inference_mode()
def predict(model: nn.Module, loader: Any) -> tuple[Tensor, Tensor]:
    """Logits ``(n, k)`` and labels ``(n,)`` of all evaluation images."""
    model.eval()
    parts = [(model(image), label) for image, label in loader]
    return torch.cat([logits for logits, _ in parts]), torch.cat([label for _, label in parts])


def measure(logits: Tensor, label: Tensor, split: LabelSplit) -> dict[str, Any]:
    """Metrics in percent; the groups are those of `shot_groups`."""
    metrics = ClassificationMetrics(split.num_classes, CPU)
    metrics.update(logits, label)
    result = metrics.compute(split.labels_per_class.tolist())
    recall = [r for r in result["per_class_recall"] if r is not None]
    error = MulticlassCalibrationError(split.num_classes, n_bins=15)(logits.softmax(-1), label)
    return result | {
        "geometric_mean": statistics.geometric_mean(recall) if min(recall) > 0 else 0.0,
        "calibration_error": 100 * error.item(),
        "recall": spaced(result["per_class_recall"]),
    }


def spaced(values: list[float | None]) -> str:
    return " ".join("-" if v is None else f"{v:.1f}" for v in values)


def run(condition: Condition, model: str, method: str, fold: int, folder: str, output: Path) -> list[dict[str, Any]]:
    """Rows of one run."""
    start = time.perf_counter()
    data = load(condition.dataset, folder)
    source, val_source = data
    split_args = train_ssl.parse_args(flags_of(condition, model, fold, METHODS[method]))
    split = make_split(source.labels, source.num_classes, **make_split_kwargs(split_args))
    checkpoint = second_stage(condition, model, fold, data, split, output)
    view = "" if "supervised" in METHODS[method] else STRONG_VIEW
    words = [*flags_of(condition, model, fold, STAGE3), *shlex.split(f"{view} {METHODS[method]}")]
    trained = train([*words, "--initial-checkpoint", str(checkpoint)], data, split)
    _, loader, _ = create_loaders(trained.args, *data, split, trained.config, 0, CPU)
    evaluation, sample = list(loader), list(trained.sample())  # drawn once for both models
    figures = pseudo_label_figures(trained.sums) or {"recall": [], "precision": []}
    means = interval_means(trained.sums)
    counts = torch.from_numpy(split.labels_per_class).clamp(min=1).float()
    rows = []
    for who, net in trained.models.items():
        logits, label = predict(net, evaluation)
        priors = {
            "none": torch.ones(()),
            "labeled": counts / counts.sum(),
            "unlabeled": mean_prediction(net, sample, nullcontext),
        }
        for posthoc, prior in priors.items():
            rows.append(
                {
                    **dict(zip(KEY, (condition.name, model, method, fold), strict=True)),
                    "who": who,
                    "posthoc": posthoc,
                    **measure(logits - prior.log(), label, split),
                    "pseudo_recall": spaced(figures["recall"]),
                    "pseudo_precision": spaced(figures["precision"]),
                    "kept_share": means.get("kept_share", ""),
                    "pseudo_accuracy": means.get("pseudo_accuracy", ""),
                    "updates": trained.updates,
                    "seconds": time.perf_counter() - start,
                }
            )
    return rows


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of the runs that ended; those of a run that was killed while it wrote are dropped from the file."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    runs = defaultdict(list)
    for row in csv.DictReader(io.StringIO(whole)):
        runs[tuple(row[name] for name in KEY)].append(row)
    rows = [row for group in runs.values() if len(group) == ROWS_OF_A_RUN for row in group]
    if whole != text or sum(map(len, runs.values())) != len(rows):
        temporary = path.with_suffix(".tmp")
        temporary.write_text(in_csv(rows, header=True))
        os.replace(temporary, path)
    return rows


def in_csv(rows: list[dict[str, Any]], header: bool) -> str:
    """Rows as text, fractions with four digits."""
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(
        {key: f"{value:.4f}" if isinstance(value, float) else value for key, value in row.items()} for row in rows
    )
    return file.getvalue()


def time_models() -> None:
    """Print parameters and the time of a training step on 64 images, alternating between the models."""
    models = {}
    for name, flags in MODELS.items():
        args = train_ssl.parse_args([*shlex.split(f"{FASHION} {flags}"), "--labels-per-class", "4"])
        model = create_model(args, 10)
        models[name] = model, torch.randn(64, *resolve_preprocessing(model, name, vars(args))["input_size"])
    seconds = defaultdict(list)
    for _ in range(8):
        for name, (model, x) in models.items():
            start = time.process_time()
            model(x).square().mean().backward()
            seconds[name].append(time.process_time() - start)
    for name, (model, _) in models.items():
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{name:8} {parameters:9,} parameters  {1000 * statistics.median(seconds[name]):6.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion-mnist", metavar="DIR", help="Fashion-MNIST in torchvision's layout")
    parser.add_argument("--openclipart", metavar="DIR", help="what benchmarks/openclipart.py made")
    parser.add_argument("--blocks", nargs="+", choices=list(BLOCKS), default=[b for b in BLOCKS if "pico" not in b])
    parser.add_argument("--folds", nargs="+", type=int, default=[3, 4, 5])
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "rare_classes.csv")
    parser.add_argument("--output", type=Path, default=Path("output/rare_classes"), help="weights of the second stages")
    parser.add_argument("--time-models", action="store_true", help="print the time of a step of each model and end")
    args = parser.parse_args()
    if args.time_models:
        time_models()
        return
    torch.set_num_threads(1)
    folders = {"fashion": args.fashion_mnist, "openclipart": args.openclipart}
    args.csv.parent.mkdir(exist_ok=True)
    done = {tuple(row[name] for name in KEY) for row in read_rows(args.csv)}
    for block in args.blocks:
        condition, model, methods = BLOCKS[block]
        if not (folder := folders[condition.dataset]):
            print(f"{block}: left out, no folder of {condition.dataset} is given")
            continue
        for fold in args.folds:
            for method in methods:
                if (condition.name, model, method, str(fold)) in done:
                    continue
                rows = run(condition, model, method, fold, folder, args.output)
                text = in_csv(rows, header=not args.csv.exists())
                with args.csv.open("a") as file:
                    file.write(text)
                last = rows[3]
                print(
                    f"{block} fold {fold} {method}: teacher {last['balanced_acc']:.1f}, few {last['few']:.1f}, "
                    f"{last['seconds']:.0f} s", flush=True,
                )  # fmt: skip


if __name__ == "__main__":
    main()
