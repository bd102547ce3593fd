"""What a block costs beside its arithmetic: a Vim block against timm's ViT block, on tensors too small to matter.

Usage: OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/host_time.py [--profile]

Both blocks take one image of 17 tokens and 32 channels, so that nearly all of their time is Python, the dispatcher and
small allocations: on a GPU the same work keeps the processor busy while the device waits. Times are the least of many
rounds of the thread's processor time; the ratio is what travels. ``--profile`` lists where the Python time goes.
"""

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable

import torch
from timm.models.vision_transformer import Block as VitBlock
from torch import Tensor, nn

from semivim.models.vim import Block as VimBlock

TOKENS, DIM, CALLS = 17, 32, 20


def least_ms(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Least time of a call of each, in milliseconds, the runs taking turns."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.thread_time()
            for _ in range(CALLS):
                run()
            best[name] = min(best[name], (time.thread_time() - start) / CALLS * 1e3)
    return best


def forward(block: nn.Module, x: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return block(x)

    return run


def both_passes(block: nn.Module, x: Tensor) -> Callable[[], object]:
    leaves = [x.requires_grad_(), *block.parameters()]
    grad = torch.ones_like(x)

    def run() -> object:
        return torch.autograd.grad(block(x), leaves, grad)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--profile", action="store_true", help="list where a Vim block's Python time goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    blocks = {"Vim": VimBlock(DIM), "ViT": VitBlock(DIM, num_heads=2, qkv_bias=True)}
    for title, make in (("forward", forward), ("forward and backward", both_passes)):
        runs = {name: make(block, torch.randn(1, TOKENS, DIM)) for name, block in blocks.items()}
        ms = least_ms(runs, args.rounds)
        print(
            f"{title:22} Vim block {ms['Vim']:.3f} ms, ViT block {ms['ViT']:.3f} ms: {ms['Vim'] / ms['ViT']:.2f} times"
        )
        if args.profile:
            profiler = cProfile.Profile()
            profiler.enable()
            for _ in range(500):
                runs["Vim"]()
            profiler.disable()
            pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
