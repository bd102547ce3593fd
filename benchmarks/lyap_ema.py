"""Cost of a teacher update: LyapEmaV3 beside timm's ModelEmaV3 and beside a training step, in one run on one thread.

Usage: OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python benchmarks/lyap_ema.py

Two figures matter: how many of timm's updates one of ours takes, and its share of a training step (forward and backward
of the student on 8 labelled and 8 unlabelled images, forward of the teacher on 8, AdamW). On a CPU an update moves
memory and a step multiplies matrices, so the share falls with the batch size.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn

import semivim

UPDATES = 30


def median_ms(actions: list[tuple[Callable[[], object], Callable[[], object]]], repeats: int) -> list[float]:
    """Median time of each (untimed preparation, action), taken in turns so that a busy moment hits all of them."""
    times: list[list[float]] = [[] for _ in actions]
    for _ in range(repeats + 2):
        for (prepare, action), spent in zip(actions, times, strict=True):
            prepare()
            start = time.perf_counter()
            action()
            spent.append(time.perf_counter() - start)
    return [1e3 * statistics.median(spent[2:]) for spent in times]


def training_step(student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer, batch: int) -> None:
    images = torch.randn(2 * batch, 3, 224, 224)
    label = torch.randint(0, 1000, (batch,))
    with torch.no_grad():
        pseudo = teacher(images[batch:]).argmax(-1)
    F.cross_entropy(student(images), torch.cat([label, pseudo])).backward()
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="semivim_tiny", help="timm model (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="labelled, and unlabelled, images a step (%(default)s)")
    args = parser.parse_args()

    torch.manual_seed(0)
    student = timm.create_model(args.model)
    weights = list(student.parameters())
    near = [w.detach() + 1e-4 * torch.randn_like(w) for w in weights]
    far = [w.detach() + 1.0 * torch.randn_like(w) for w in weights]

    def place(values: list[torch.Tensor]) -> Callable[[], None]:
        return lambda: torch._foreach_copy_([w.data for w in weights], values)

    plain = ModelEmaV3(student)
    guarded = semivim.LyapEmaV3(student)
    place(far)()
    assert guarded.update(student).violated
    place(near)()
    calm = {mode: semivim.LyapEmaV3(student, mode=mode) for mode in ("default", "paper_stable")}
    updates = {
        "ModelEmaV3": (place(near), lambda: plain.update(student)),
        "LyapEmaV3 default, calm": (place(near), lambda: calm["default"].update(student)),
        "LyapEmaV3 paper_stable, calm": (place(near), lambda: calm["paper_stable"].update(student)),
        "LyapEmaV3 default, guard at work": (place(far), lambda: guarded.update(student)),
    }
    milliseconds = dict(zip(updates, median_ms(list(updates.values()), UPDATES), strict=True))
    optimizer = torch.optim.AdamW(weights, lr=1e-6)
    (step_ms,) = median_ms([(place(near), lambda: training_step(student, plain.module, optimizer, args.batch))], 3)
    milliseconds[f"training step, {args.batch} + {args.batch} images"] = step_ms

    print(
        f"{args.model}, {sum(w.numel() for w in weights) / 1e6:.1f} M parameters, {torch.get_num_threads()} thread(s)"
    )
    print(f"{'':34} {'ms':>9} {'x ModelEmaV3':>13} {'% of a step':>12}")
    for title, ms in milliseconds.items():
        print(f"{title:34} {ms:9.2f} {ms / milliseconds['ModelEmaV3']:13.2f} {100 * ms / step_ms:12.3f}")


if __name__ == "__main__":
    main()
