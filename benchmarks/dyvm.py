"""DyVM against the Vim that it was made of, on one CPU thread, as ratios measured in one run.

Usage: OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 PYTHONPATH=. python benchmarks/dyvm.py [--gates 0.8] [--stages]

The released token ratios (0.7 for the small model, 0.9 for the tiny one), random weights, images of 224 and 448 pixels.
Which directions an image goes through is drawn anew for every image and block, with the share that the release aims at;
``1`` computes all of them, so that the row shows what the dropped tokens alone save.

``--stages`` prints, for one block of the small model at each length of the sequence, the time of its stages beside the
time that the full length takes times the share of tokens left: what a stage that is linear in the tokens could reach.

The sides of a ratio run in turn; each time is CPU time of the process, the smallest of the repeats.
"""

import argparse
import platform
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode
from vim import forward, seconds

import semivim
from semivim.models import DyVM
from semivim.ops.linear import vendor

PAIRS = {"dyvm_small": "vim_small_patch16_224", "dyvm_tiny": "vim_tiny_patch16_224"}
CASES = ((224, 1), (224, 8), (448, 1))


def processor() -> str:
    """Model name of the processor, from Linux."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def draw_gates(model: DyVM, share: float, batch: int) -> None:
    """Let every image choose each direction of each block with a probability; drawn beforehand, to take no time."""
    draws = torch.rand(100 * len(model.blocks), batch, 2, generator=torch.Generator().manual_seed(0))
    logits = cycle((draws < share).float() - 0.5)
    for block in model.blocks:
        block.mixer.block_head.register_forward_hook(lambda *_: next(logits))


def gigaflops(name: str, size: int) -> float:
    """Operations of one image, all directions computed, as `benchmarks/model_table.py` counts them."""
    model = timm.create_model(name, img_size=size, device="meta").eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() / 1e9


def compare(name: str, size: int, batch: int, shares: tuple[float, ...], repeats: int) -> None:
    x = torch.randn(batch, 3, size, size)
    runs: dict[str, Callable[[], object]] = {}
    runs["Vim"] = partial(forward, timm.create_model(PAIRS[name], img_size=size).eval(), x)
    for share in shares:
        model = timm.create_model(name, img_size=size).eval()
        draw_gates(model, share, batch)
        runs[f"directions {share:g}"] = partial(forward, model, x)
    times = seconds(runs, repeats)
    bound = gigaflops(PAIRS[name], size) / gigaflops(name, size)
    cells = [f"{key} {value * 1e3:7.1f} ms ({times['Vim'] / value:.2f}x)" for key, value in times.items()]
    print(f"  {name:10} {size} px, batch {batch}:  " + "   ".join(cells) + f"   FLOPs of all directions {bound:.2f}x")


def stages(repeats: int) -> None:
    """Time of a block's stages at each length, beside the full length's times the share of tokens."""
    model = timm.create_model("dyvm_small").eval()
    mixer, router = model.blocks[0].mixer, model.score_predictors[0]
    lengths = [197, *(int(model.token_ratio ** (s + 1) * 196) + 1 for s in range(3))]
    print("\nstages of a block of dyvm_small, batch 8: ms, and in brackets the least at that length")
    full: dict[str, float] = {}
    for l in lengths:
        x = torch.randn(8, l, 384)
        xz = mixer.in_proj(x).detach()
        weights = mixer._weights(("", "_b"))
        mix = partial(semivim.ops.mixer.mix_tokens, xz, scale=0.5)
        y = mix(weights, [False, True]).detach()
        runs = {
            "norm": partial(forward, model.blocks[0].norm, x),
            "in_proj": partial(forward, mixer.in_proj, x),
            "both directions": partial(forward, lambda _, m=mix, w=weights: m(w, [False, True]), x),
            "one direction": partial(forward, lambda _, m=mix, w=weights: m(w[:1], [False]), x),
            "out_proj": partial(forward, mixer.out_proj, y),
            "router": partial(forward, lambda x: router.score(x, None), x[:, 1:]),
        }
        times = seconds(runs, 3 * repeats)
        full = full or times
        print(
            f"  {l:4} tokens  " + "  ".join(f"{k} {v * 1e3:.2f} ({full[k] * l / 197e-3:.2f})" for k, v in times.items())
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each side (%(default)s)")
    parser.add_argument("--gates", type=float, default=0.8, help="share of directions that images choose (%(default)s)")
    parser.add_argument("--stages", action="store_true", help="time the stages of a block as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{processor()} ({vendor() or 'vendor unknown'}), torch {torch.__version__}, one thread")
    for name in PAIRS:
        for size, batch in CASES:
            compare(name, size, batch, (1.0, args.gates), args.repeats)
    if args.stages:
        stages(args.repeats)


if __name__ == "__main__":
    main()
