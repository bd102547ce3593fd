"""The scan and whole Vim models on a GPU, as ratios measured in one run.

Usage: python benchmarks/gpu_scan.py [--dtype bfloat16] [--repeats 30]

- Between the mixer's two outer projections at b=64, l=197, d=384 (and one image of 6085 tokens): ours against Vim's
  way, two one-directional branches (causal-conv1d, mamba-ssm's scan) of which one runs on a flipped copy. Forward, and
  forward with backward. Left out where mamba-ssm or causal-conv1d is not installed; it builds with
  ``pip install --no-build-isolation mamba-ssm causal-conv1d``.
- vim_{tiny,small}_patch16_224 against deit_{tiny,small}_patch16_224, with and without fused attention, at 224 and
  1248 pixels: images a second and peak memory, inference and training step.

Times are medians of CUDA events after a warm-up; all sides run under the same autocast.
"""

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable

import timm
import torch
from timm.layers import set_fused_attn
from torch import Tensor, nn
from torch.nn import functional as F

import semivim
from semivim.layers import BidirectionalMamba
from semivim.ops import available_backends

MODELS = (("vim_tiny_patch16_224", "deit_tiny_patch16_224"), ("vim_small_patch16_224", "deit_small_patch16_224"))
SIZES = ((224, 128, 64), (1248, 8, 1))  # pixels, batch for inference, batch for training
OURS, VIMS_WAY = "ours", "Vim's way"


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cuda", dtype, enabled=dtype != torch.float32)


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Median time on the device."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def peak_mib(run: Callable[[], object]) -> float:
    """Memory a run takes above what was taken before it, in MiB."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


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
        module.zero_grad()

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
            times = {name: milliseconds(run[kind], repeats) for name, run in runs.items()}
            memory = {name: peak_mib(run[kind]) for name, run in runs.items()}
            line = ", ".join(f"{name} {times[name]:.3f} ms {memory[name]:.0f} MiB" for name in times)
            ratio = "" if lacking else f", {times[VIMS_WAY] / times[OURS]:.2f}x"
            print(f"  {kind}: {line}{ratio}")


def compare_models(dtype: torch.dtype, repeats: int) -> None:
    for size, batch, train_batch in SIZES:
        for vim, deit in MODELS:
            print(f"\n{size} px, {dtype}: images a second and peak MiB")
            for name, fused in ((vim, True), (deit, True), (deit, False)):
                set_fused_attn(fused)
                model = timm.create_model(name, img_size=size).cuda()
                set_fused_attn(True)
                line = f"  {name}{'' if fused else ', attention not fused'}:"
                for kind, images in (("forward", batch), ("forward and backward", train_batch)):
                    x = torch.randn(images, 3, size, size, device="cuda")
                    model.train(kind != "forward")
                    run = passes(model, x, dtype)[kind]
                    try:
                        rate = 1e3 * images / milliseconds(run, repeats)
                        line += f" {kind} {rate:.0f}/s {peak_mib(run):.0f} MiB (b={images});"
                    except torch.cuda.OutOfMemoryError:
                        line += f" {kind} out of memory (b={images});"
                        torch.cuda.empty_cache()
                print(line.rstrip(";"))
                del model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of autocast")
    parser.add_argument("--repeats", type=int, default=30, help="timed runs of each side")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_scan.py: no CUDA device is available; nothing was measured")
    torch.manual_seed(0)
    properties = torch.cuda.get_device_properties(0)
    print(f"{properties.name}, torch {torch.__version__}, semivim {semivim.__version__}")
    for name, state in available_backends("cuda").items():
        print(f"  {name}: {state!s}")
    dtype = getattr(torch, args.dtype)
    compare_inner(dtype, args.repeats)
    compare_models(dtype, args.repeats)


if __name__ == "__main__":
    main()
