"""Mean and spread of every method on the same splits; each seed is another split and another initialisation.

    python benchmarks/ssl_methods.py --seeds 3                    the demo's digits, 4 labels a class
    python benchmarks/ssl_methods.py --seeds 1 -- --dataset torch/fashion_mnist --data-dir DIR ...

Words after ``--`` go to train_ssl.py. Runs that are there already are read, not repeated.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
METHODS = {
    "supervised": ["--ssl-method", "supervised"],
    "fixmatch": ["--ssl-method", "fixmatch", "--pseudo-mixup", "none"],
    "ema-teacher": ["--ssl-method", "ema-teacher", "--pseudo-mixup", "none"],
    "lyapema": ["--ssl-method", "lyapema", "--pseudo-mixup", "none"],
    "lyapema+ss": ["--ssl-method", "lyapema", "--pseudo-mixup", "ss"],
}


def train(method: str, seed: int, output: Path, extra: list[str]) -> dict:
    """Run train_ssl.py once on one thread, or read what an earlier run left."""
    folder = output / f"{method}-{seed}"
    if not (folder / "metrics.json").exists():
        flags = ["--output", str(output), "--experiment", folder.name, "--seed", str(seed), "--fold", str(seed)]
        subprocess.run(
            [sys.executable, str(ROOT / "train_ssl.py"), *METHODS[method], *flags, *extra],
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
    parser.add_argument("--output", type=Path, default=Path("output/ssl_methods"))
    args, extra = parser.parse_known_args()
    extra = [word for word in extra if word != "--"]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {
            method: [pool.submit(train, method, seed, args.output, extra) for seed in range(args.seeds)]
            for method in args.methods
        }
    names = ["top1", "balanced_acc", "many", "medium", "few", "worst_class_recall"]
    results = {method: [run.result() for run in futures] for method, futures in runs.items()}
    names = [n for n in names if all(n in r["teacher"] for rs in results.values() for r in rs)]
    print(f"{'':12}" + "".join(f"{'teacher ' + n:>28}" for n in names) + f"{'student top1':>18}{'seconds':>10}")
    for method, rs in results.items():
        cells = "".join(f"{spread([r['teacher'][n] for r in rs]):>28}" for n in names)
        print(f"{method:12}{cells}{spread([r['student']['top1'] for r in rs]):>18}", end="")
        print(f"{statistics.mean(r['seconds'] for r in rs):10.0f}")


if __name__ == "__main__":
    main()
