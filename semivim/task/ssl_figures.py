"""Figures of semi-supervised training for the log: of each batch as tensors, of an interval as plain numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from semivim.task.semi_supervised import SemiSupervisedTask
from semivim.utils.lyap_ema import LyapEmaV3

KEPT_CLASSES = "kept_classes"
LOSSES = ("loss_labelled", "loss_unlabelled")


def batch_figures(result: Mapping[str, Tensor], label: Tensor | None) -> dict[str, Tensor]:
    """Figures of a batch, which an interval adds up.

    Args:
        result: What :meth:`SemiSupervisedTask.forward` returned.
        label: True class of each unlabelled image, ``(mu_b,)``, -1 where unknown; None without unlabelled images.

    Returns:
        The losses, the numbers of ``unlabelled`` images and of those ``kept``, and of the kept ones whose class is
        ``known`` and whose pseudo-label is ``right``; 0-d, on the device of the result. ``kept_classes``, ``(c,)``,
        are the kept ones of each pseudo-label.
    """
    figures = {name: result[name] for name in LOSSES if name in result}
    if "keep" in result and label is not None:
        known = result["keep"] & (label >= 0)
        figures["unlabelled"] = torch.tensor(float(len(label)))
        figures["kept"] = result["keep"].sum().float()
        figures["known"] = known.sum().float()
        kept_classes = torch.zeros(result["output"].shape[-1], device=result["keep"].device)
        figures[KEPT_CLASSES] = kept_classes.scatter_add_(0, result["pseudo"], result["keep"].float())
        figures["right"] = (known & (result["pseudo"] == label)).sum().float()
    return figures


def interval_means(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Means of an interval, and the number of its skipped steps.

    Args:
        sums: Sums of :func:`batch_figures`, with ``batches`` and ``skipped`` of ``optimizer_step``.
    """
    total = {key: value.item() for key, value in sums.items() if key != KEPT_CLASSES}
    means = {name: total[name] / total["batches"] for name in LOSSES if name in total}
    if "kept" in total:
        means["kept_share"] = total["kept"] / total["unlabelled"]
        if total["known"]:
            means["pseudo_accuracy"] = total["right"] / total["known"]
    if "skipped" in total:
        means["skipped"] = total["skipped"]
    return means


def pseudo_label_summary(sums: Mapping[str, Tensor], class_names: Sequence[str] | None) -> dict[str, Any]:
    """What became of the unlabelled images, {} without any.

    Args:
        sums: Sums of :func:`batch_figures`.
        class_names: Names of the classes, if they have any.

    Returns:
        Numbers of images ``seen`` and ``kept``, and as ``fault`` a sentence where they cannot have taught anything:
        none was kept, or at least half were and all of them with one pseudo-label. None otherwise.
    """
    if "kept" not in sums:
        return {}
    seen, kept = int(sums["unlabelled"].item()), int(sums["kept"].item())
    most, largest = (int(value.item()) for value in sums[KEPT_CLASSES].max(dim=0))
    fault = None
    if kept == 0:
        fault = "no unlabelled image was kept, as no confidence exceeded --threshold: they taught nothing"
    elif most == kept and 2 * kept >= seen and len(sums[KEPT_CLASSES]) > 1:
        name = class_names[largest] if class_names else f"class {largest}"
        fault = f"every unlabelled image that was kept has the pseudo-label {name!r}: they taught that class only"
    return {"seen": seen, "kept": kept, "fault": fault}


def teacher_figures(task: SemiSupervisedTask) -> dict[str, float]:
    """What the teacher's last update did; {} before the first."""
    if task.alpha is None:
        return {}
    figures, stats, average = {"alpha": task.alpha}, task.lyap_stats, task.trainable_module_ema
    if stats is not None and isinstance(average, LyapEmaV3):
        figures.update(v=stats.v, distance=stats.distance / max(stats.teacher_norm, 1e-12))
        figures.update(guard_rate=average.guard_rate, lr_scale=stats.lr_scale)
    return figures
