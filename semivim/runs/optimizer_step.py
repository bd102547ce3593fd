"""One optimizer step of semi-supervised training, and the figures that an interval of steps adds up."""

from collections import Counter
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.utils import NativeScaler, dispatch_clip_grad

from semivim.data.two_views import SslBatch
from semivim.task.semi_supervised import SemiSupervisedTask


def train_step(
    task: SemiSupervisedTask,
    batches: list[SslBatch],
    optimizer: torch.optim.Optimizer,
    autocast: Any,
    scaler: NativeScaler | None,
    mixup: Mixup | None,
    clip: dict[str, Any],
    device: torch.device,
) -> bool:
    """One optimizer step over one or more accumulated batches; its figures are added to the task's sums.

    Returns:
        Whether the step was taken: it is not where a gradient is not finite.
    """
    sums: dict[str, torch.Tensor] = {}
    parameters = list(task.get_clip_parameters(exclude_head=clip["clip_mode"] == "agc"))
    scale = scaler.state_dict()["scale"] if scaler is not None else 1.0
    for i, batch in enumerate(batches):
        image, label = batch.labelled.image.to(device), batch.labelled.label.to(device)
        if mixup is not None:
            image, label = mixup(image, label)
        weak = batch.unlabelled.weak.to(device) if batch.unlabelled else None
        strong = batch.unlabelled.strong.to(device) if batch.unlabelled else None
        last = i == len(batches) - 1
        with nullcontext() if last else task.no_sync():
            with autocast():
                result = task(image, label, weak, strong)
            loss = result["loss"] / len(batches)
            if scaler is not None:
                scaler(loss, optimizer, parameters=parameters, need_update=last, **clip)
            else:
                loss.backward()
        add_up(sums, result, batch.unlabelled.label.to(device) if batch.unlabelled else None)
    if scaler is not None:  # it takes the step itself, or leaves it out and lowers its scale
        taken = scaler.state_dict()["scale"] >= scale
    else:
        gradients = [p.grad for p in task.get_clip_parameters() if p.grad is not None]
        taken = bool(torch.nn.utils.get_total_norm(gradients).isfinite())
        if taken:
            if clip["clip_grad"] is not None:
                dispatch_clip_grad(parameters, clip["clip_grad"], mode=clip["clip_mode"])
            optimizer.step()
    optimizer.zero_grad()
    sums["skipped"] = torch.tensor(float(not taken))
    accumulate(task.interval_sums, sums)
    accumulate(task.epoch_sums, sums)
    return taken


def add_up(sums: dict[str, torch.Tensor], result: dict[str, torch.Tensor], label: torch.Tensor | None) -> None:
    """Add a batch's figures to ``sums`` without waiting for the device."""
    values = {"batches": torch.ones(())} | {k: result[k] for k in ("loss_labelled", "loss_unlabelled") if k in result}
    if "keep" in result and label is not None:
        known = result["keep"] & (label >= 0)
        values["unlabelled"] = torch.tensor(float(len(label)))
        values["kept"] = result["keep"].sum().float()
        values["known"] = known.sum().float()
        values["right"] = (known & (result["pseudo"] == label)).sum().float()
    accumulate(sums, values)


def accumulate(sums: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    """Add ``values`` to ``sums``, key by key."""
    for key, value in values.items():
        sums[key] = sums[key] + value if key in sums else value


def summarise(sums: dict[str, torch.Tensor], task: SemiSupervisedTask) -> dict[str, float]:
    """Means of an interval, its skipped steps and the teacher's last Lyapunov figures, as plain numbers."""
    total = {key: value.item() for key, value in sums.items()}
    values: dict[str, float] = {
        key: total[key] / total["batches"] for key in ("loss_labelled", "loss_unlabelled") if key in total
    }
    if "kept" in total:
        values["kept_share"] = total["kept"] / total["unlabelled"]
        if total["known"]:
            values["pseudo_accuracy"] = total["right"] / total["known"]
    if "skipped" in total:
        values["skipped"] = total["skipped"]
    stats = task.lyap_stats
    if stats is not None:
        values["alpha"] = stats.alpha
        if task.method == "lyapema":
            values.update(v=stats.v, distance=stats.distance / max(stats.teacher_norm, 1e-12))
            values.update(guard_rate=task.trainable_module_ema.guard_rate, lr_scale=stats.lr_scale)
    return values


def update_seed(seed: int, update: int, rank: int) -> int:
    """Seed of one rank's update, in [0, 2**32): no two ranks come near each other's in any run of realistic length."""
    # the golden ratio of 2**32 spreads the ranks; on one rank seeds of consecutive updates follow each other
    return (seed * 1_000_003 + update + rank * 2_654_435_761) % 2**32


def sum_over_ranks(counts: dict[int, int]) -> dict[int, int]:
    """Sum counts over all processes, which all have to call this."""
    if not dist.is_initialized():
        return dict(counts)
    parts: list[dict[int, int]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, counts)
    return dict(sum((Counter(part) for part in parts), Counter()))


def mean_lr(optimizer: torch.optim.Optimizer) -> float:
    """Learning rate as timm logs it, the mean over parameter groups."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return sum(rates) / len(rates)
