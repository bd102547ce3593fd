"""Mean and spread of every method on the same splits; each seed is another split and another initialisation.

    python benchmarks/ssl_methods.py --seeds 3                    digits, 4 labels a class
    python benchmarks/ssl_methods.py --seeds 1 --fashion-mnist DIR
                                                                  long-tailed Fashion-MNIST in torchvision's layout

Fashion-MNIST as Debian's ``dataset-fashion-mnist`` ships it becomes DIR by
``mkdir -p DIR/FashionMNIST/raw; for f in /usr/share/datasets/fashion-mnist/*.gz; do gunzip -c $f >
DIR/FashionMNIST/raw/$(basename ${f%.gz}); done``. Runs that are there already are read, not repeated, and
interrupted ones go on. Words that are not flags here go to train_ssl.py.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
METHODS = {
    "supervised": ["--ssl-method", "supervised"],
    "fixmatch": ["--ssl-method", "fixmatch", "--pseudo-mixup", "none"],
    "ema-no-warm-up": ["--ssl-method", "ema-teacher", "--pseudo-mixup", "none", "--no-model-ema-warmup"],
    "ema-teacher": ["--ssl-method", "ema-teacher", "--pseudo-mixup", "none"],
    "lyapema": ["--ssl-method", "lyapema", "--pseudo-mixup", "none"],
    "lyapema-wide": [
        *("--ssl-method", "lyapema", "--pseudo-mixup", "none"),
        *("--lyap-min-decay", "0.9", "--model-ema-decay", "0.999"),
    ],
    "lyapema+ss": ["--ssl-method", "lyapema", "--pseudo-mixup", "ss"],
}
DIGITS = ["--labels-per-class", "4", "--eval-metric", "top1"]  # in place of the demo's long tail
STRONG_VIEW = ["--strong-aa", "rand-m5-mstd0.5-inc1"]  # the demo's; supervised training has no such view
FASHION = shlex.split(
    "--dataset torch/fashion_mnist --model semivim_pico --in-chans 1 --mean 0.286 --std 0.353 --imb-n1 200 "
    "--imb-factor-l 20 --imb-m1 2000 --imb-factor-u 20 -b 16 --unlabeled-ratio 4 --epochs 20 "
    "--train-batches-per-epoch 20 --val-interval 20 --opt adamw --lr 2e-3 --weight-decay 0.05 --sched-on-updates "
    "--warmup-epochs 2 --model-ema-decay 0.99 --scale 0.6 1 --color-jitter 0 "
    "-vb 250 --log-interval 20 --checkpoint-hist 1 --eval-metric balanced_acc -j 0"
)


def train(method: str, seed: int, output: Path, extra: list[str]) -> dict:
    """Run train_ssl.py once on one thread, or read what an earlier run left."""
    folder = output / f"{method}-{seed}"
    if not (folder / "metrics.json").exists():
        view = [] if method == "supervised" else STRONG_VIEW
        flags = [*view, "--output", str(output), "--experiment", folder.name, "--resume", "auto"]
        flags += ["--seed", str(seed), "--fold", str(seed)]
        subprocess.run(
            [sys.executable, str(ROOT / "train_ssl.py"), *flags, *extra, *METHODS[method]],
            env=os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            check=True,
        )
    return json.loads((folder / "metrics.json").read_text())


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):6.2f} +- {statistics.stdev(values) if len(values) > 1 else 0.0:4.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--output", type=Path, default=None, help="folder of the runs (output/ssl_methods/DATA)")
    parser.add_argument("--fashion-mnist", metavar="DIR", help="train on long-tailed Fashion-MNIST instead of digits")
    args, extra = parser.parse_known_args()
    args.output = args.output or Path("output/ssl_methods") / ("fashion_mnist" if args.fashion_mnist else "digits")
    data = [*FASHION, "--data-dir", args.fashion_mnist] if args.fashion_mnist else DIGITS
    extra = [*data, *extra]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {
            method: [pool.submit(train, method, seed, args.output, extra) for seed in range(args.seeds)]
            for method in args.methods
        }
    names = ["top1", "balanced_acc", "many", "medium", "few", "worst_class_recall"]
    results = {method: [run.result() for run in futures] for method, futures in runs.items()}
    names = [n for n in names if all(n in r["teacher"] for rs in results.values() for r in rs)]
    print(f"{'':16}" + "".join(f"{'teacher ' + n:>28}" for n in names) + f"{'student top1':>18}{'seconds':>10}")
    for method, rs in results.items():
        cells = "".join(f"{spread([r['teacher'][n] for r in rs]):>28}" for n in names)
        print(f"{method:16}{cells}{spread([r['student']['top1'] for r in rs]):>18}", end="")
        print(f"{statistics.mean(r['seconds'] for r in rs):10.0f}")


if __name__ == "__main__":
    main()
