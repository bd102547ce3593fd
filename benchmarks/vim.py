"""Whole Vim models on one CPU thread, as ratios measured in one run.

Usage: OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python benchmarks/vim.py [--repeats 5] [--large] [--no-loop]

- vim_tiny_patch16_224, batch 8: forward and training step against timm's vit_tiny_patch16_224 grown to the same depth,
  and against the same model with other scans: mamba.py's `pscan` (package mambapy), the token loop of mamba-ssm's plain
  version (forward only: a training step takes minutes), our own leaner one.
- What SSMixup's hidden-state mixing adds to a training step, for each reading of C.
- ``--large``: one image of 1248 x 1248 against deit_tiny_patch16_224 at that size, time and peak memory.

The sides of a ratio run in turn; each time is CPU time of the process, the smallest of the repeats, so that other
processes disturb little.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import timm
import torch
from scan import by_pscan, token_loop
from timm.layers import set_fused_attn
from torch import Tensor, nn
from torch.nn import functional as F

import semivim
from semivim.layers import mamba
from semivim.layers.ssmixup_readout import SSMIXUP_C

BATCH, SIZE = 8, 224


def seconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Smallest time of each, after one warm-up."""
    best = dict.fromkeys(runs, float("inf"))
    for round_ in range(repeats + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if round_:
                best[name] = min(best[name], time.process_time() - start)
    return best


def forward(model: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        model(x)


def step(model: nn.Module, x: Tensor, *mix: Tensor) -> None:
    model(x, *mix).square().mean().backward()
    model.zero_grad()


@contextmanager
def scan_by(function: Callable[..., Tensor]) -> Iterator[None]:
    """Let the mixer scan each direction with a function of u, delta, A, B, C (see benchmarks/scan.py)."""
    calls = 0

    def read_out(f):
        nonlocal calls
        calls += 1
        u, delta, bc = (x.flip(1) if f.reverse else x for x in (f.u, f.delta, f.bc))
        s = function(u, F.softplus(delta + f.delta_bias), f.A, *bc.chunk(2, -1))
        return (s.flip(1) if f.reverse else s) + f.D * f.u

    def scan(directions, z, _mix, scale):
        return scale * F.silu(z) * sum(read_out(f) for f in directions)

    ours = mamba.scan, mamba.is_eager
    mamba.scan, mamba.is_eager = scan, lambda _: False  # in eager mode the mixer does not call `scan`
    try:
        yield
    finally:
        mamba.scan, mamba.is_eager = ours
    assert calls, "the mixer did not call the scan that was to be measured"


def within(context: Callable, run: Callable[[], object]) -> Callable[[], None]:
    def runs() -> None:
        with context():
            run()

    return runs


def compare_224(repeats: int, loops: bool) -> None:
    x = torch.randn(BATCH, 3, SIZE, SIZE)
    vim = timm.create_model("vim_tiny_patch16_224").eval()
    vit = timm.create_model("vit_tiny_patch16_224", depth=24).eval()
    scans = {
        "mamba.py's pscan": partial(scan_by, by_pscan),
        "our own token loop": partial(semivim.use_backend, "reference"),
        "mamba-ssm's plain token loop": partial(scan_by, token_loop),
    }
    scans = scans if loops else {}
    for name, context in scans.items():
        with torch.no_grad(), context():
            other = vim(x)
        assert (vim(x) - other).abs().max() < 1e-4, f"{name} and ours disagree"
    for title, run, others in (("forward", forward, scans), ("training step", step, list(scans)[:2])):
        runs: dict[str, Callable[[], object]] = {
            "vim_tiny_patch16_224": partial(run, vim, x),
            "vit_tiny_patch16_224, depth 24": partial(run, vit, x),
        }
        runs |= {f"the same Vim, {name}": within(scans[name], partial(run, vim, x)) for name in others}
        report(f"{title}, batch {BATCH}, {SIZE} x {SIZE}", seconds(runs, repeats))


def compare_mixing(repeats: int) -> None:
    x, psi, nu = torch.randn(BATCH, 3, SIZE, SIZE), torch.rand(BATCH), torch.full((BATCH,), 0.1)
    runs: dict[str, Callable[[], object]] = {}
    for reading in SSMIXUP_C:
        model = timm.create_model("semivim_tiny", depth=4, ssmixup_c=reading)
        if not runs:
            runs["no mixing"] = partial(step, model, x)
        runs[f"mixing, C {reading}"] = partial(step, model, x, psi, nu)
    report(f"training step, 4 blocks of semivim_tiny, batch {BATCH}", seconds(runs, 3 * repeats))


def resident_bytes(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process, from Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def grow(build: Callable[[], nn.Module], size: int, answer: Connection) -> None:
    """Send how far one forward pass raises the peak of a fresh process's memory."""
    torch.set_num_threads(1)
    forward(timm.create_model("test_vim"), torch.randn(1, 3, 32, 32))  # kernels compiled, libraries loaded
    model, x = build(), torch.randn(1, 3, size, size)
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    forward(model, x)
    answer.send(resident_bytes("VmHWM") - before)


def peak_bytes(build: Callable[[], nn.Module], size: int) -> int:
    receive, send = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=grow, args=(build, size, send))
    process.start()
    grown = receive.recv()
    process.join()
    return grown


def build_large(name: str, fused: bool, size: int) -> nn.Module:
    set_fused_attn(fused)
    return timm.create_model(name, img_size=size).eval()


def compare_large(repeats: int, size: int = 1248) -> None:
    x = torch.randn(1, 3, size, size)
    builds = {
        "vim_tiny_patch16_224": partial(build_large, "vim_tiny_patch16_224", True, size),
        "deit_tiny_patch16_224, fused attention": partial(build_large, "deit_tiny_patch16_224", True, size),
        "deit_tiny_patch16_224": partial(build_large, "deit_tiny_patch16_224", False, size),
    }
    times = seconds({name: partial(forward, build(), x) for name, build in builds.items()}, repeats)
    report(f"forward, one image of {size} x {size}", times)
    peaks = {name: peak_bytes(build, size) for name, build in builds.items()}
    for name, peak in peaks.items():
        print(f"  {peak / 2**20:9.0f} MiB  {peak / peaks['deit_tiny_patch16_224']:6.1%}  {name}")


def report(title: str, times: dict[str, float]) -> None:
    print(f"\n{title}")
    first = next(iter(times.values()))
    for name, value in times.items():
        print(f"  {value * 1e3:9.1f} ms  {value / first:6.2f}x  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each side (%(default)s)")
    parser.add_argument("--large", action="store_true", help="compare at 1248 x 1248 as well")
    parser.add_argument("--no-loop", action="store_true", help="leave out the other scans, which take minutes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    compare_224(args.repeats, not args.no_loop)
    compare_mixing(args.repeats)
    if args.large:
        compare_large(max(1, args.repeats // 2))


if __name__ == "__main__":
    main()
