"""Priors of the classes, and how logits are adjusted by them: one function per equation.

Legend: ``k`` classes, ``b`` images of a batch. A prior is a vector of class shares, ``(k,)`` float32, positive, with
sum 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

LEAST_SHARE = 1e-8  # of a class in an estimated prior, whose logarithm must stay finite


def labelled_prior(counts: Sequence[int]) -> Tensor:
    """Share of each class among the labelled images: ``pi_l(k) = max(n_k, 1) / sum_j max(n_j, 1)``.

    A class without labels counts as one with a single label: its logarithm must stay finite, or the class would win
    every adjusted prediction.

    Args:
        counts: Labelled images ``n_k`` of each class.

    Raises:
        ValueError: If a count is negative, or there are none.

    Source: Menon et al., ICLR 2021 (arXiv:2007.07314), Section 3; the rule for empty classes is ours.
    """
    numbers = torch.as_tensor(list(counts), dtype=torch.float64)
    if not len(numbers) or (numbers < 0).any():
        raise ValueError(f"counts must be one number of images, 0 or more, for each class, got {list(counts)}")
    numbers = numbers.clamp(min=1)
    return (numbers / numbers.sum()).float()


def adjust_logits(logits: Tensor, prior: Tensor, tau: float) -> Tensor:
    """``f + tau log pi`` in float32: the logit adjustment, with a negative ``tau`` its inverse.

    Args:
        logits: ``f``, ``(b, k)``, any floating dtype.
        prior: ``pi``, ``(k,)``.
        tau: Strength; 1 moves a balanced classifier to the prior.

    Returns:
        ``(b, k)`` float32.

    Source: Menon et al. (arXiv:2007.07314), Eq. (9) and (10).
    """
    return logits.float() + tau * prior.log()


def update_prior(prior: Tensor, mean: Tensor, momentum: float) -> Tensor:
    """Running mean of class probabilities: ``m p + (1 - m) mean``, ``(k,)``, at least ``LEAST_SHARE``, with sum 1.

    Args:
        prior: ``p``, ``(k,)``.
        mean: Mean class probabilities of a step, ``(k,)``.
        momentum: ``m``, in [0, 1].

    Source: Wang et al., CVPR 2022 (arXiv:2201.01490), Eq. (3).
    """
    updated = (momentum * prior + (1.0 - momentum) * mean).clamp(min=LEAST_SHARE)
    return updated / updated.sum()


def prior_divergence(prior: Tensor, reference: Tensor) -> Tensor:
    """Kullback-Leibler divergence ``KL(prior || reference) = sum_k p_k log(p_k / r_k)`` in nats, 0-d.

    Args:
        prior: ``p``, ``(k,)``; classes with share 0 add nothing.
        reference: ``r``, ``(k,)``, positive.
    """
    return torch.xlogy(prior, prior / reference).sum()


def histogram_entropy(counts: Tensor) -> Tensor:
    """Entropy of the shares of the classes in nats, 0-d: ``log k`` where all are equal, 0 for one class or no image.

    Args:
        counts: Number, or summed weight, of the images of each class, ``(k,)``.
    """
    shares = counts / counts.sum().clamp(min=torch.finfo(counts.dtype).tiny)
    return -torch.xlogy(shares, shares).sum()
