"""Cost of autoregressive pretraining beside supervised training of the same Vim, as ratios of one run.

    OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python benchmarks/arm.py [--model NAME] [--img-size N] [--batch N]

Times are the least of several, forward and backward passes together. Memory is what autograd keeps for the backward
pass, each tensor once, weights left out. On a GPU (--device cuda) under bfloat16 autocast.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import semivim  # noqa: F401
from semivim.models.arm_decoder import DIRECTIONS, ArmModel
from semivim.ops.mixer import mix_tokens
from semivim.task.arm import ArmTask

Step = Callable[[], Tensor]


def seconds(steps: list[Step], device: torch.device, repeats: int) -> list[float]:
    """Least time of each step with its backward pass; steps take turns, so that all meet the same machine."""
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(repeats + 1):
        for step, spent in zip(steps, times, strict=True):
            start = time.perf_counter()
            step().backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            spent.append(time.perf_counter() - start)
    return [min(spent[1:]) for spent in times]


def kept_bytes(step: Callable[[], Tensor], module: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of a step."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = step()
    del loss
    return sum(size for place, size in storages.items() if place not in weights)


def one_direction_against_both(blocks: nn.Sequential, tokens: Tensor) -> dict[str, list[Step]]:
    """Steps of one direction and of both over the same tokens: of a mixer between its projections, of all blocks."""
    weights = blocks[0].mixer._weights(("", "_b"))
    inner = torch.randn(*tokens.shape[:2], 4 * tokens.shape[2], device=tokens.device, requires_grad=True)

    def core(count: int) -> Tensor:
        return mix_tokens(inner, weights[:count], [False, True][:count]).sum()

    def encoder(one_direction: bool) -> Tensor:
        x = tokens
        for block in blocks:
            x = block.one_direction(x, False) if one_direction else block(x)
        return x.sum()

    return {
        "mixer between its projections": [partial(core, 1), partial(core, 2)],
        "all blocks": [partial(encoder, True), partial(encoder, False)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vim_tiny_patch16_224")
    parser.add_argument("--img-size", type=int, default=192)
    parser.add_argument("--cluster", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    autocast: Callable[[], AbstractContextManager] = nullcontext
    if device.type == "cuda":
        autocast = partial(torch.autocast, device.type, dtype=torch.bfloat16)

    def cast(step: Step) -> Step:
        def under_autocast() -> Tensor:
            with autocast():
                return step()

        return under_autocast

    model = partial(timm.create_model, args.model, img_size=args.img_size)
    images = torch.randn(args.batch, 3, args.img_size, args.img_size, device=device)
    labels = torch.arange(args.batch, device=device)
    tasks = {d: ArmTask(ArmModel(model(num_classes=0), args.cluster, d)).to(device) for d in DIRECTIONS}
    classifier, arm = model(num_classes=1000).to(device), tasks["forward"].model
    tokens = torch.randn(args.batch, (arm.num_clusters - 1) * arm.cluster_size, classifier.embed_dim, device=device)

    print(f"{args.model} at {args.img_size}, batch {args.batch}, {tokens.shape[1]} tokens read, {device}")
    print("one direction against both, same tokens")
    for name, steps in one_direction_against_both(classifier.blocks, tokens).items():
        one, both = seconds([cast(step) for step in steps], device, args.repeats)
        print(f"  {name:32} {1000 * one:9.1f} ms / {1000 * both:9.1f} ms = {one / both:.2f}")

    def supervised() -> Tensor:
        return F.cross_entropy(classifier(images), labels)

    def pretrain(task: ArmTask) -> Tensor:
        return task(images)["loss"]

    modules = [*tasks.values(), classifier]
    steps = [cast(step) for step in (*(partial(pretrain, task) for task in tasks.values()), supervised)]
    *times, whole = seconds(steps, device, args.repeats)
    *kept, memory = (kept_bytes(step, module) for step, module in zip(steps, modules, strict=True))
    print("a step of pretraining against a supervised step, same images")
    for name, spent, size in zip(tasks, times, kept, strict=True):
        print(
            f"  {name:8} {1000 * spent:9.1f} ms / {1000 * whole:9.1f} ms = {spent / whole:.2f}, kept for the backward "
            f"{size / 2**20:.0f} / {memory / 2**20:.0f} MiB = {size / memory:.2f}, {args.batch / spent:.1f} images/s"
        )


if __name__ == "__main__":
    main()
