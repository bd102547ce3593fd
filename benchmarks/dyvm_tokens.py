"""What dropping tokens costs in accuracy: DyVM's choice beside the same patches for every image.

    OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 PYTHONPATH=. python benchmarks/dyvm_tokens.py --seeds 3

scikit-learn's digits at 32 x 32, 64 patches. For each seed a Vim of 8 blocks is trained; from it, and with it as their
teacher, a DyVM for each token ratio and one whose routers are replaced: ``static`` keeps the patches nearest to the
middle, the same of every image, and is trained alike. A run takes under a minute of one thread. Rows are appended to a
CSV file as they come; what is there already is not run again. Milliseconds are CPU time of an image of a batch of 64,
the least of five; MFLOPs count all directions, as masks would compute them, and ``directions`` says which share is.
"""

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from semivim.data import open_source
from semivim.layers import RoutedTokens, TokenRouter
from semivim.layers.token_router import keep_best
from semivim.models import DyVM, Vim
from semivim.task.dyvm import DyVMTask

SIZES = {"img_size": 32, "patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 48, "depth": 8}
LOCATIONS, RATIOS, BATCH = (2, 4, 6), (0.9, 0.7, 0.5), 32
COLUMNS = ("method", "ratio", "seed", "top1", "mflops", "directions", "ms")


class StaticRouter(TokenRouter):
    """Keep the patches nearest to the middle of the grid."""

    def forward(self, tokens: RoutedTokens) -> RoutedTokens:
        axis = torch.arange(8.0) - 3.5
        distance = (axis[:, None].square() + axis.square()).flatten()
        distance = distance + torch.arange(64) * 1e-3  # no ties
        place = torch.arange(64).expand(len(tokens.x), -1) if tokens.place is None else tokens.place
        return keep_best(tokens, torch.stack([-distance[place], distance[place]], -1), self.keep_ratio)


def digits(split: str) -> tuple[Tensor, Tensor]:
    """Images ``(n, 1, 32, 32)`` in [-1, 1] and classes ``(n,)``."""
    source = open_source("embedded/digits", split=split)
    pixels = [torch.frombuffer(bytearray(source.image(i).tobytes()), dtype=torch.uint8) for i in range(len(source))]
    return torch.stack(pixels).view(-1, 1, 32, 32).float() / 127.5 - 1, torch.from_numpy(source.labels).long()


def train(module: nn.Module, loss_of, steps: int, lr: float, seed: int) -> None:
    """AdamW with a linear warm-up and a cosine to 0, on images shifted by up to two pixels."""
    images, labels = digits("train")
    draws = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    module.train()
    for _ in range(steps):
        rows = torch.randint(len(images), (BATCH,), generator=draws)
        shift = torch.randint(-2, 3, (2,), generator=draws).tolist()
        loss = loss_of(images[rows].roll(shift, (2, 3)), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.inference_mode()
def measure(model: nn.Module) -> dict[str, float]:
    """Accuracy, operations and time of an image, and the share of directions that are computed."""
    model.eval()
    images, labels = digits("validation")
    right = sum(
        (model(x).argmax(-1) == y).sum().item() for x, y in zip(images.split(64), labels.split(64), strict=True)
    )
    with FlopCounterMode(display=False) as counter:
        model(images[:1])
    gates = model(images, return_decisions=True).gates.mean().item() if isinstance(model, DyVM) else 1.0
    times = []
    for _ in range(5):
        start = time.process_time()
        model(images[:64])
        times.append((time.process_time() - start) / 64 * 1e3)
    top1, mflops = 100 * right / len(labels), counter.get_total_flops() / 1e6
    return {"top1": top1, "mflops": mflops, "directions": gates, "ms": min(times)}


def teacher_of(seed: int, steps: int, folder: Path) -> Vim:
    """The plain Vim of a seed, trained once and kept."""
    torch.manual_seed(seed)
    vim, path = Vim(**SIZES), folder / f"vim-{seed}.pt"
    if path.exists():
        vim.load_state_dict(torch.load(path, weights_only=True))
    else:
        train(vim, lambda x, y: F.cross_entropy(vim(x), y), steps, 3e-3, seed)
        torch.save(vim.state_dict(), path)
    return vim


def student_of(method: str, ratio: float, vim: Vim, steps: int, seed: int) -> DyVM:
    torch.manual_seed(seed)
    model = DyVM(**SIZES, pruning_loc=LOCATIONS, token_ratio=ratio)
    model.load_vim(vim.state_dict())
    if method == "static":
        model.score_predictors = nn.ModuleList([StaticRouter(48, 1.0) for _ in LOCATIONS])
        model.score_predictors.requires_grad_(False)
        model.set_token_ratio(ratio)
    task = DyVMTask(model, vim)
    train(task, lambda x, y: task(x, y)["loss"], steps, 1e-3, seed)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teacher-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("output/dyvm_tokens"), help="folder of the teachers")
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "dyvm_tokens.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.csv
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    runs = [("vim", 1.0), *((method, ratio) for ratio in RATIOS for method in ("dyvm", "static"))]
    for seed in range(args.seeds):
        for method, ratio in runs:
            key = {"method": method, "ratio": str(ratio), "seed": str(seed)}
            if any(key.items() <= row.items() for row in rows):
                continue
            model: nn.Module = teacher_of(seed, args.teacher_steps, args.output)
            if method != "vim":
                model = student_of(method, ratio, model, args.steps, seed)
            rows.append(key | {name: f"{value:.4g}" for name, value in measure(model).items()})
            with path.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                if len(rows) == 1:
                    writer.writeheader()
                writer.writerow(rows[-1])
    print("| method | token ratio | top-1 (%) | MFLOPs | directions | ms an image |\n|---|---|---|---|---|---|")
    for method, ratio in runs:
        of_run = [row for row in rows if (row["method"], row["ratio"]) == (method, str(ratio))]
        top1 = [float(row["top1"]) for row in of_run]
        spread = f"{statistics.mean(top1):.1f} +- {statistics.stdev(top1) if len(top1) > 1 else 0:.1f}"
        means = [statistics.mean(float(row[name]) for row in of_run) for name in ("mflops", "directions", "ms")]
        print(f"| {method} | {ratio} | {spread} | {means[0]:.1f} | {means[1]:.2f} | {means[2]:.2f} |")


if __name__ == "__main__":
    main()
