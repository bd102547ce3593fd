"""Rules that replace a fixed confidence threshold: FreeMatch's thresholds and SoftMatch's weights.

Legend: ``b`` unlabelled images of a batch, ``k`` classes, ``o`` the confidence of an image, ``yhat`` its pseudo-label.
"""

import torch
from torch import Tensor


def freematch_threshold(pseudo: Tensor, threshold: Tensor, class_probs: Tensor) -> Tensor:
    """Threshold of each image: ``tau p(yhat) / max_k p(k)``, lower for classes that the model predicts less.

    Args:
        pseudo: ``yhat``, ``(b,)`` int64.
        threshold: ``tau``, running mean of the confidence, 0-d.
        class_probs: ``p``, running mean of the class probabilities, ``(k,)``.

    Returns:
        ``(b,)`` float32.

    Source: Wang et al., ICLR 2023, FreeMatch (arXiv:2205.07246), Eq. (5)-(8).
    """
    return threshold * (class_probs / class_probs.max())[pseudo]


def softmatch_weight(confidence: Tensor, mean: Tensor, var: Tensor, num_sigma: float = 2.0) -> Tensor:
    """Weight of each image: ``exp(-min(o - mu, 0)^2 / (2 var / num_sigma^2))``, 1 at and above the mean confidence.

    Args:
        confidence: ``o``, ``(b,)``.
        mean: ``mu``, running mean of the confidence, 0-d.
        var: Running variance of the confidence, 0-d.
        num_sigma: The standard deviation is divided by this.

    Returns:
        ``(b,)`` float32 in [0, 1].

    Source: Chen et al., ICLR 2023, SoftMatch (arXiv:2301.10921), Eq. (7), and its code for ``num_sigma``.
    """
    below = (confidence - mean).clamp(max=0.0)
    return torch.exp(-below.square() / (2.0 * var.clamp(min=1e-12) / num_sigma**2))
