"""VMamba on one CPU thread, as ratios measured in one run.

    pip install mambapy && OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python benchmarks/vmamba.py [--repeats 5] [--stages]

- vmamba_tiny_s1l8 at 224 pixels, batch 4: forward and training step against timm's swin_tiny_patch4_window7_224, and
  against the same model on a token loop: that of mamba-ssm's plain version, which VMamba falls back to without a GPU
  (forward only: a training step takes minutes), and our own leaner one.
- What a block of each of its stages does, beside the least that this machine could need (see benchmarks/scan.py).

The sides of a ratio run in turn; each time is CPU time, the smallest of the repeats, so that other processes disturb
little.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import timm
import torch
from scan import (
    Limits,
    both_passes,
    copy_bytes_per_s,
    exps_per_s,
    forward_only,
    gemm_per_s,
    keep_memory,
    least_s,
    processor,
    token_loop,
)
from torch import Tensor
from torch.nn import functional as F
from vim import forward, report, seconds, step, within

import semivim
from semivim.layers import SS2D, cross_scan
from semivim.layers.cross_scan import transposed
from semivim.ops.linear import linear
from semivim.ops.scan import scan

BATCH, SIZE, MODEL = 4, 224, "vmamba_tiny_s1l8"


@contextmanager
def scan_by_token_loop() -> Iterator[None]:
    """Let the mixer scan each direction as mamba-ssm's plain version does."""

    def read_out(f):
        u, delta, bc = (x.flip(1) if f.reverse else x for x in (f.u, f.delta, f.bc))
        s = token_loop(u, F.softplus(delta + f.delta_bias), f.A, *bc.chunk(2, -1))
        return (s.flip(1) if f.reverse else s) + f.D * f.u

    cross_scan.scan = lambda directions: sum(read_out(f) for f in directions)
    try:
        yield
    finally:
        cross_scan.scan = scan


def compare(repeats: int, loop: bool) -> None:
    x = torch.randn(BATCH, 3, SIZE, SIZE)
    ours = timm.create_model(MODEL).eval()
    swin = timm.create_model("swin_tiny_patch4_window7_224").eval()
    loops = {
        "our own token loop": partial(semivim.use_backend, "reference"),
        "mamba-ssm's plain token loop": scan_by_token_loop,
    }
    for name, context in loops.items() if loop else ():
        with torch.no_grad(), context():
            other = ours(x[:1])
        assert (ours(x[:1]) - other).abs().max() < 1e-4, f"{name} and ours disagree"
    for title, run, slow in (("forward", forward, list(loops)), ("training step", step, list(loops)[:1])):
        runs: dict[str, Callable[[], object]] = {MODEL: partial(run, ours, x), "swin_tiny": partial(run, swin, x)}
        times = seconds(runs, repeats)
        for name in slow if loop else ():
            times |= seconds({f"the same VMamba, {name}": within(loops[name], partial(run, ours, x))}, 1)
        report(f"{title}, batch {BATCH}, {SIZE} x {SIZE}", times)


def convolve(u: Tensor, weight: Tensor) -> Tensor:
    d = u.shape[-1]
    u = F.conv2d(u.permute(0, 3, 1, 2), weight, padding=1, groups=d)
    return F.silu(u).permute(0, 2, 3, 1)


def normalise(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def operands(ss2d: SS2D, u: Tensor) -> list[Tensor]:
    """Those of a pair of directions, as `SS2D.both_ways` has them."""
    with torch.no_grad():
        b, h, w, d = u.shape
        dbc = torch.randn(b, h * w, 2, ss2d.x_proj_weight.shape[1])
        pair = [ss2d.direction(u.view(b, h * w, d), dbc[:, :, k], 2 * k, bool(k)) for k in (0, 1)]
    return [x.detach().requires_grad_() for x in (pair[0].u, *(x for f in pair for x in f[1:6]))]


def scan_pair(u: Tensor, *tensors: Tensor) -> Tensor:
    return scan([semivim.Direction(u, *tensors[5 * k : 5 * k + 5], reverse=bool(k)) for k in (0, 1)])


def stage_of(i: int, limits: Limits, repeats: int) -> None:
    """Print the parts of a block of stage i."""
    side, d = SIZE >> (i + 2), 96 << i
    tokens, tensor = BATCH * side**2, BATCH * side**2 * d * 4
    ss2d = SS2D(d, 1, 1)
    per_direction, rank = ss2d.x_proj_weight.shape[1], ss2d.dt_rank
    u = torch.randn(BATCH, side, side, d).requires_grad_()
    pair = operands(ss2d, u)
    print(f"\na block of stage {i}: batch {BATCH}, {side} x {side}, d {d}, n 1, float32")
    print(f"{'':28}{'forward':>12}{'limit':>9}{'+ backward':>12}{'limit':>9}")

    def weight(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns).requires_grad_()

    low = torch.randn(tokens, rank).requires_grad_()
    hidden = torch.randn(BATCH, side, side, 4 * d).requires_grad_()
    # Name, times, function, its tensors, maps of b h w d read and written by each pass, multiply-adds a token,
    # exponentials and logarithms a value of the map in each pass (a pair of scans: decays and softplus twice).
    parts = (
        ("in_proj, out_proj", 2, linear, [u, weight(d, d)], (2, 5), d * d, (0, 0)),
        ("convolution, SiLU", 1, convolve, [u, torch.randn(d, 1, 3, 3).requires_grad_()], (2, 5), 0, (1, 2)),
        ("x_proj", 1, linear, [u, weight(4 * per_direction, d)], (1, 3), 4 * per_direction * d, (0, 0)),
        ("dt_proj", 4, F.linear, [low, weight(d, rank)], (1, 2), rank * d, (0, 0)),
        ("transposition", 2, transposed, [u], (2, 4), 0, (0, 0)),
        ("scans", 2, scan_pair, pair, (4, 11), 0, (6, 14)),
        ("norms", 3, normalise, [u], (2, 5), 0, (0, 0)),
        ("MLP, in", 1, F.linear, [u, weight(4 * d, d)], (5, 15), 4 * d * d, (0, 0)),
        ("MLP, GELU", 1, F.gelu, [hidden], (8, 20), 0, (4, 12)),
        ("MLP, out", 1, F.linear, [hidden, weight(d, 4 * d)], (5, 15), 4 * d * d, (0, 0)),
    )
    sums = [0.0] * 4
    for name, times, function, inputs, moved, products, exponentials in parts:
        forward_s, total_s = (least_s(call(function, inputs), repeats) for call in (forward_only, both_passes))
        least = [
            max(
                maps * tensor / limits.bandwidth,
                passes * 2 * tokens * products / limits.gemm,
                exps * tensor / 4 / limits.exps,
            )
            for maps, passes, exps in zip(moved, (1, 3), exponentials, strict=True)
        ]
        row = [times * x for x in (forward_s, least[0], total_s, least[1])]
        sums = [x + y for x, y in zip(sums, row, strict=True)]
        print_row(f"{name} ({times})" if times > 1 else name, row)
    print_row("sum", sums)


def print_row(name: str, row: list[float]) -> None:
    a, b, c, d = (1e3 * x for x in row)
    print(f"{name:28}{a:9.2f} ms{b:9.2f}{c:9.2f} ms{d:9.2f}  {a / b:5.1f}x {c / d:5.1f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each side (%(default)s)")
    parser.add_argument("--stages", action="store_true", help="only the parts of a block")
    parser.add_argument("--no-loop", action="store_true", help="leave the token loops out, which take a minute")
    args = parser.parse_args()
    keep_memory()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"{processor()}, torch {torch.__version__}, one thread")
    if not args.stages:
        compare(args.repeats, not args.no_loop)
    limits = Limits(exps_per_s(), copy_bytes_per_s(), gemm_per_s(linear))
    print(f"\n{limits.exps / 1e9:.1f} G exponentials/s,", end=" ")
    print(f"copy {limits.bandwidth / 1e9:.1f} GB/s, GEMM {limits.gemm / 1e9:.0f} GFLOP/s")
    for i in range(4):
        stage_of(i, limits, 4 * args.repeats)


if __name__ == "__main__":
    main()
