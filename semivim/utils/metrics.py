"""Classification metrics that show what happens to rare classes."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix


class ClassificationMetrics:
    """Top-1, top-5 and everything a confusion matrix holds, summed over batches and processes.

    Args:
        num_classes: Number of classes.
        device: Where predictions live.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.confusion = MulticlassConfusionMatrix(num_classes).to(device)
        self.top5 = MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes)).to(device)

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch: logits ``(b, num_classes)``, class indices ``(b,)``."""
        logits = logits.float()
        self.confusion.update(logits.argmax(-1), target)
        self.top5.update(logits, target)

    def compute(self, train_counts: Sequence[int] | None = None) -> dict[str, Any]:
        """Metrics in percent.

        Args:
            train_counts: Training images per class, labelled and unlabelled, which set the many / medium / few groups.

        Returns:
            ``top1``, ``top5``, ``balanced_acc`` (mean recall of the classes present), ``worst_class_recall``,
            ``per_class_recall`` (None for a class without images), ``confusion`` (rows: true class), and where
            ``train_counts`` are long-tailed ``many``, ``medium``, ``few``.
        """
        confusion = self.confusion.compute().cpu()
        present = confusion.sum(1) > 0
        recall = 100.0 * confusion.diag() / confusion.sum(1).clamp(min=1)
        result: dict[str, Any] = {
            "top1": 100.0 * confusion.diag().sum().item() / max(1, confusion.sum().item()),
            "top5": 100.0 * self.top5.compute().item(),
            "balanced_acc": recall[present].mean().item(),
            "worst_class_recall": recall[present].min().item(),
            "per_class_recall": [r if p else None for r, p in zip(recall.tolist(), present.tolist(), strict=True)],
            "confusion": confusion.tolist(),
        }
        for name, classes in shot_groups(train_counts or []).items():
            members = [c for c in classes if present[c]]
            if members:
                result[name] = recall[members].mean().item()
        return result


def shot_groups(train_counts: Sequence[int], many: int = 100, few: int = 20) -> dict[str, list[int]]:
    """Classes with many, medium and few training images.

    More than ``many`` and fewer than ``few`` images as in ImageNet-LT; below 100 classes, where those bounds leave
    groups empty, thirds of the classes by count, of which classes with equal counts are never parted. Nothing where the
    largest class is not even twice the smallest.
    """
    if not train_counts or max(train_counts) < 2 * min(train_counts):
        return {}
    classes = sorted(range(len(train_counts)), key=lambda c: (-train_counts[c], c))
    if len(classes) < 100:
        ordered, third = [train_counts[c] for c in classes], len(classes) / 3
        first, second = (_nearest_step(ordered, min(round(n * third), len(classes) - 1)) for n in (1, 2))
        return {"many": classes[:first], "medium": classes[first:second], "few": classes[second:]}
    groups: dict[str, list[int]] = {"many": [], "medium": [], "few": []}
    for c in classes:
        groups["many" if train_counts[c] > many else "few" if train_counts[c] < few else "medium"].append(c)
    return groups


def _nearest_step(ordered: Sequence[int], cut: int) -> int:
    """The position nearest to ``cut`` that does not part equal values of an ordered list, at an end only if need be."""
    start = ordered.index(ordered[cut])
    steps = [step for step in (start, start + ordered.count(ordered[cut])) if 0 < step < len(ordered)]
    return min(steps, key=lambda step: abs(step - cut), default=0)


def describe_groups(train_counts: Sequence[int]) -> str:
    """The groups of :func:`shot_groups` with their borders, in a line, '' where there are none."""
    parts = []
    for name, classes in shot_groups(train_counts).items():
        if classes:
            counts = [train_counts[c] for c in classes]
            parts.append(f"{name} {min(counts):,} to {max(counts):,} ({len(classes)} classes)")
    return f"groups of classes by training images: {', '.join(parts)}" if parts else ""


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    train_counts: Sequence[int],
) -> dict[str, Any]:
    """Metrics (see :meth:`ClassificationMetrics.compute`) of a model, in eval mode, over the images of all ranks.

    The loader yields images and labels on ``device``.
    """
    model.eval()
    metrics = ClassificationMetrics(num_classes, device)
    for image, label in loader:
        with autocast():
            logits = model(image)
        metrics.update(logits, label)
    return metrics.compute(train_counts)
