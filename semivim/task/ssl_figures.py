"""Figures of semi-supervised training for the log: of each batch as tensors, of an interval as plain numbers."""

from collections.abc import Mapping

import torch
from torch import Tensor

from semivim.task.semi_supervised import SemiSupervisedTask
from semivim.utils.lyap_ema import LyapEmaV3

LOSSES = ("loss_labelled", "loss_unlabelled")


def batch_figures(result: Mapping[str, Tensor], label: Tensor | None) -> dict[str, Tensor]:
    """Figures of a batch, which an interval adds up.

    Args:
        result: What :meth:`SemiSupervisedTask.forward` returned.
        label: True class of each unlabelled image, ``(mu_b,)``, -1 where unknown; None without unlabelled images.

    Returns:
        The losses, the numbers of ``unlabelled`` images and of those ``kept``, and of the kept ones whose class is
        ``known`` and whose pseudo-label is ``right``; 0-d, on the device of the result.
    """
    figures = {name: result[name] for name in LOSSES if name in result}
    if "keep" in result and label is not None:
        known = result["keep"] & (label >= 0)
        figures["unlabelled"] = torch.tensor(float(len(label)))
        figures["kept"] = result["keep"].sum().float()
        figures["known"] = known.sum().float()
        figures["right"] = (known & (result["pseudo"] == label)).sum().float()
    return figures


def interval_means(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Means of an interval, and the number of its skipped steps.

    Args:
        sums: Sums of :func:`batch_figures`, with ``batches`` and ``skipped`` of ``optimizer_step``.
    """
    total = {key: value.item() for key, value in sums.items()}
    means = {name: total[name] / total["batches"] for name in LOSSES if name in total}
    if "kept" in total:
        means["kept_share"] = total["kept"] / total["unlabelled"]
        if total["known"]:
            means["pseudo_accuracy"] = total["right"] / total["known"]
    if "skipped" in total:
        means["skipped"] = total["skipped"]
    return means


def teacher_figures(task: SemiSupervisedTask) -> dict[str, float]:
    """What the teacher's last update did; {} before the first."""
    if task.alpha is None:
        return {}
    figures, stats, average = {"alpha": task.alpha}, task.lyap_stats, task.trainable_module_ema
    if stats is not None and isinstance(average, LyapEmaV3):
        figures.update(v=stats.v, distance=stats.distance / max(stats.teacher_norm, 1e-12))
        figures.update(guard_rate=average.guard_rate, lr_scale=stats.lr_scale)
    return figures
