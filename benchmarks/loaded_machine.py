"""Training beside other programs: images per second of the demo alone and beside busy loops, one a core.

    python benchmarks/loaded_machine.py

A fair scheduler gives the demo half of the processor then. `train_ssl.py` lets waiting threads sleep
(OMP_WAIT_POLICY=passive) unless the variable is set; beside it stands what spinning threads, torch's default, get.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
UPDATES = 40
BUSY = "while True: pass"


def images_per_second(**environment: str) -> float:
    """Median over the second half of some updates of the demo."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            "--epochs",
            "1",
            "--warmup-epochs",
            "0",
            "--train-batches-per-epoch",
            str(UPDATES),
            "--log-interval",
            "1",
        ]
        place = ["--output", folder, "--experiment", "run", "--val-interval", "1000"]
        subprocess.run(
            [sys.executable, ROOT / "train_ssl.py", *flags, *place],
            env=os.environ | environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        records = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    speeds = [record["images_per_s"] for record in records if "images_per_s" in record]
    return statistics.median(speeds[len(speeds) // 2 :])


@contextmanager
def busy_cores() -> Iterator[None]:
    """A loop for each core that this process may use."""
    loops = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in os.sched_getaffinity(0)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def main() -> None:
    alone = images_per_second()
    print(f"alone: {alone:.0f} images/s")
    with busy_cores():
        for name, policy in (("threads that sleep", "passive"), ("threads that spin", "active")):
            speed = images_per_second(OMP_WAIT_POLICY=policy)
            print(f"beside busy loops, {name}: {speed:.0f} images/s, {speed / (alone / 2):.2f} of a fair share")


if __name__ == "__main__":
    main()
