"""The loss of semi-supervised training: one function per equation (Semi-ViM Eq. 17-21)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def confidence_and_pseudo(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Largest class probability and its class: ``p = softmax(logits)``, ``o = max p``, ``yhat = argmax p``.

    The softmax is taken in float32 whatever the dtype of the logits: a half precision confidence moves rows across
    the threshold.

    Args:
        logits: Prediction on the weak view, ``(b, k)``.

    Returns:
        Confidence ``o``, ``(b,)`` float32 in (0, 1], and pseudo-label, ``(b,)`` int64; both without gradient.

    Source: Semi-ViM Eq. (17), (18).
    """
    confidence, pseudo = logits.detach().float().softmax(-1).max(-1)
    return confidence, pseudo


def keep_mask(confidence: Tensor, threshold: float) -> Tensor:
    """Rows that train: ``1[o > tau]``, ``(b,)`` bool (the indicator of Semi-ViM Eq. 21)."""
    return confidence > threshold


def labelled_loss(logits: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of the labelled rows.

    Args:
        logits: ``(b, k)``.
        target: Class indices ``(b,)``, or soft targets ``(b, k)`` which are used as they are.
        smoothing: Label smoothing of class indices, in [0, 1).

    Returns:
        Scalar float32.

    Source: Semi-ViM Eq. (20).
    """
    if target.ndim == 2:
        smoothing = 0.0  # mixed targets come smoothed already
    return F.cross_entropy(logits.float(), target, label_smoothing=smoothing)


def unlabelled_loss(logits: Tensor, target: Tensor, keep: Tensor) -> Tensor:
    """Cross-entropy of the kept rows, averaged over the whole unlabelled batch.

    The sum is divided by ``b`` and not by ``keep.sum()``: with few confident rows the term must be small.

    Args:
        logits: Student's prediction on the strong or mixed view, ``(b, k)``.
        target: Pseudo-labels ``(b,)``, or soft or mixed ones ``(b, k)``.
        keep: ``(b,)`` bool, or the weight of each row in [0, 1].

    Returns:
        Scalar float32; zero, with zero gradient, where nothing is kept.

    Source: Semi-ViM Eq. (21).
    """
    loss = F.cross_entropy(logits.float(), target, reduction="none")
    # where, not a product: a row that is not kept may hold inf, and 0 * inf is NaN
    return torch.where(keep > 0, keep * loss, 0.0).mean()
