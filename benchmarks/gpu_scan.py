"""The scan and whole Vim models on a GPU, as ratios measured in one run, from a checkout without installation.

Usage: python benchmarks/gpu_scan.py [--dtype bfloat16] [--repeats 8]

- The kernels alone, at a Vim block's shapes with 16 states and with one.
- Between the mixer's two outer projections at b=64, l=197, d=384 (and one image of 6085 tokens): ours against Vim's
  way, two one-directional branches (causal-conv1d, mamba-ssm's scan) of which one runs on a flipped copy. Forward, and
  forward with backward. Left out where mamba-ssm or causal-conv1d is not installed; it builds with
  ``pip install --no-build-isolation mamba-ssm causal-conv1d``.
- vim_{tiny,small}_patch16_224 against deit_{tiny,small}_patch16_224 and a ViT of Vim's depth, at 224 pixels, the tiny
  ones at 1248 too: images a second and peak memory, inference and training step.

Device time is what a CUDA graph of the work takes, so that the host does not count; wall time is what a user waits for,
the host included. Medians after a warm-up; all sides run under the same autocast.
"""

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))  # the checkout's own package

import semivim
from semivim.layers import BidirectionalMamba
from semivim.ops import Direction, available_backends, conv_triton, scan_triton

MODELS = (
    ("vim_tiny_patch16_224", {}),
    ("vit_tiny_patch16_224", {"depth": 24}),
    ("deit_tiny_patch16_224", {}),
    ("vim_small_patch16_224", {}),
    ("deit_small_patch16_224", {}),
)
SIZES = ((224, 256, 128, 5), (1248, 8, 4, 3))  # pixels, batches for inference and training, models of `MODELS`
KERNEL_SHAPES = ((64, 197, 384, 16), (128, 197, 384, 16), (8, 6085, 384, 16), (1, 6085, 384, 16), (64, 3136, 96, 1))
OURS, VIMS_WAY = "ours", "Vim's way"


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cuda", dtype, enabled=dtype != torch.float32)


def wall_ms(run: Callable[[], object], repeats: int) -> float:
    """Median time of a run, the host's included."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def device_ms(run: Callable[[], object], repeats: int) -> float:
    """Median time of a run recorded as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    time = wall_ms(graph.replay, repeats)
    del graph
    return time


def peak_mib(run: Callable[[], object]) -> float:
    """Memory a run takes above what was taken before it, in MiB."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def random_rows(b: int, l: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(b, l, width, device="cuda", dtype=dtype)


def compare_kernels(dtype: torch.dtype, repeats: int) -> None:
    """Print what the Triton kernels of both directions take."""
    print(f"\nkernels of both directions, {dtype}: device ms forward, backward; MiB saved for the backward")
    for b, l, d, n in KERNEL_SHAPES:
        rows = partial(random_rows, b, l, dtype=dtype)
        weights = [torch.randn(d, 1, 4, device="cuda"), torch.randn(d, device="cuda")]
        A, ones = -torch.rand(d, n, device="cuda"), torch.ones(d, device="cuda")
        directions = [Direction(rows(d), rows(d), rows(2 * n), A, ones, -4 * ones, back) for back in (False, True)]
        z = rows(2 * d)[..., d:]
        out, saved = scan_triton.forward(directions, z, None, 0.5, True)
        pairs, reverse = [(weights[0], weights[1])] * 2, [False, True]
        runs = (
            partial(scan_triton.forward, directions, z, None, 0.5, True),
            partial(scan_triton.backward, out, directions, z, None, 0.5, True, saved),
            partial(conv_triton.forward, z, pairs, reverse),
            partial(conv_triton.backward, [out, out], z, pairs, reverse),
        )
        times = [device_ms(run, repeats) for run in runs]
        mib = saved.numel() * saved.itemsize / 2**20
        scan, conv = (f"{times[k]:.3f}, {times[k + 1]:.3f}" for k in (0, 2))
        print(f"  b={b} l={l} d={d} n={n}: scan {scan} ({mib:.0f} MiB); convolution {conv}")


class Inner(nn.Module):
    """A mixer without its outer projections, by this package: ``(b, l, 2 d)`` to ``(b, l, d)``."""

    def __init__(self, mixer: BidirectionalMamba) -> None:
        super().__init__()
        self.mixer = mixer
        mixer.in_proj, mixer.out_proj = nn.Identity(), nn.Identity()

    def forward(self, xz: Tensor) -> Tensor:
        return self.mixer(xz)


class VimInner(nn.Module):
    """The same as Vim's released models compute it: rows of tokens, one branch on a flipped copy.

    Its input projection leaves ``(b, 2 d, l)`` at no cost, so that is what it is given.
    """

    def __init__(self, mixer: BidirectionalMamba) -> None:
        super().__init__()
        self.mixer = mixer

    def branch(self, xz: Tensor, end: str) -> Tensor:
        from causal_conv1d import causal_conv1d_fn
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        m = self.mixer
        conv, x_proj, dt_proj = (getattr(m, name + end) for name in ("conv1d", "x_proj", "dt_proj"))
        A = -torch.exp((m.A_b_log if end else m.A_log).float())
        x, z = xz.chunk(2, 1)
        u = causal_conv1d_fn(x, conv.weight[:, 0], conv.bias, activation="silu")
        dt, B, C = x_proj(u.transpose(1, 2)).split([m.dt_rank, m.d_state, m.d_state], -1)
        delta = F.linear(dt, dt_proj.weight).transpose(1, 2)
        D = (m.D_b if end else m.D).float()
        B, C = B.transpose(1, 2).contiguous(), C.transpose(1, 2).contiguous()
        return selective_scan_fn(u, delta, A, B, C, D, z, dt_proj.bias.float(), delta_softplus=True)

    def forward(self, rows: Tensor) -> Tensor:
        out = self.branch(rows, "") + self.branch(rows.flip(-1), "_b").flip(-1)
        return (out / 2).transpose(1, 2)


def passes(module: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """A forward as in inference, and a forward with its backward."""

    def forward() -> None:
        with torch.inference_mode(), autocast(dtype):
            module(x)

    def step() -> None:
        with autocast(dtype):
            out = module(x)
        out.float().square().mean().backward()
        module.zero_grad(set_to_none=True)

    return {"forward": forward, "forward and backward": step}


def compare_inner(dtype: torch.dtype, repeats: int) -> None:
    lacking = [name for name in ("mamba_ssm", "causal_conv1d") if importlib.util.find_spec(name) is None]
    if lacking:
        print(f"\nVim's way is left out: {' and '.join(lacking)} not installed.")
    for b, l, inner in ((64, 197, 384), (64, 197, 768), (1, 6085, 384)):
        mixer = BidirectionalMamba(inner // 2).cuda()
        xz = torch.randn(b, l, 2 * inner, device="cuda", dtype=dtype, requires_grad=True)
        rows = xz.detach().transpose(1, 2).contiguous().requires_grad_()
        sides = {OURS: (Inner(mixer), xz)} | ({} if lacking else {VIMS_WAY: (VimInner(mixer), rows)})
        print(f"\ninside the mixer, b={b} l={l} d={inner}, {dtype}")
        if not lacking:
            with torch.no_grad(), autocast(dtype):
                ours, theirs = (side(x).float() for side, x in sides.values())
            print(f"  largest relative difference: {(ours - theirs).abs().max() / theirs.abs().max():.1e}")
        runs = {name: passes(side, x, dtype) for name, (side, x) in sides.items()}
        for kind in ("forward", "forward and backward"):
            device = {name: device_ms(run[kind], repeats) for name, run in runs.items()}
            wall = {name: wall_ms(run[kind], repeats) for name, run in runs.items()}
            line = ", ".join(
                f"{name} {device[name]:.3f} ms on the device, {wall[name]:.3f} in all, {peak_mib(run[kind]):.0f} MiB"
                for name, run in runs.items()
            )
            ratio = "" if lacking else f", {wall[VIMS_WAY] / wall[OURS]:.2f}x"
            print(f"  {kind}: {line}{ratio}")


def compare_models(dtype: torch.dtype, repeats: int) -> None:
    for size, batch, train_batch, count in SIZES:
        print(f"\n{size} px, {dtype}: images a second by wall time (by device time), peak MiB")
        for name, options in MODELS[:count]:
            model = timm.create_model(name, img_size=size, **options).cuda()
            line = f"  {name}{', depth 24' if options else ''}:"
            for kind, images in (("forward", batch), ("forward and backward", train_batch)):
                x = torch.randn(images, 3, size, size, device="cuda")
                model.train(kind != "forward")
                run = passes(model, x, dtype)[kind]
                wall, device = (1e3 * images / time(run, repeats) for time in (wall_ms, device_ms))
                line += f" {kind} {wall:.0f}/s ({device:.0f}/s) {peak_mib(run):.0f} MiB (b={images});"
                torch.cuda.empty_cache()
            print(line.rstrip(";"), flush=True)
            del model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of autocast")
    parser.add_argument("--repeats", type=int, default=8, help="timed runs of each side")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_scan.py: no CUDA device is available; nothing was measured")
    torch.manual_seed(0)
    properties = torch.cuda.get_device_properties(0)
    print(f"{properties.name}, torch {torch.__version__}, semivim {semivim.__version__}")
    for name, state in available_backends("cuda").items():
        print(f"  {name}: {state!s}")
    dtype = getattr(torch, args.dtype)
    compare_kernels(dtype, args.repeats)
    compare_inner(dtype, args.repeats)
    compare_models(dtype, args.repeats)


if __name__ == "__main__":
    main()
