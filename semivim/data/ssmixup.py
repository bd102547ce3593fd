"""Mixing of unlabelled images by the confidence of their pseudo-labels: SSMixup's input side and probabilistic mixup.

Legend: ``b`` unlabelled images of a step, ``c`` channels, ``h``, ``w`` pixels, ``k`` classes. Every function is a pure
function of tensors with static shapes: the same graph whatever the number of retained images.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class MixedBatch(NamedTuple):
    """Images mixed in pairs, with their targets and the row of each one's partner."""

    images: Tensor  # (b, c, h, w)
    targets: Tensor  # (b, k), rows sum to 1
    partner: Tensor  # (b,), int64


def pair_retained(keep: Tensor) -> Tensor:
    """Draw for every retained row another retained row as its partner.

    The retained rows are joined into one ring in random order, so no row is paired with itself as long as there are
    two. Rows outside, and a single retained row, are their own partners.

    Args:
        keep: Retained rows, ``(b,)``, bool.

    Returns:
        Index of the partner, ``(b,)``, int64; a permutation of the rows.
    Source: Semi-ViM Eq. (12)-(13) leaves the pairing open; it pairs among retained images only.
    """
    rows = torch.arange(keep.shape[0], device=keep.device)
    key = torch.rand(keep.shape[0], device=keep.device)
    ring = torch.where(keep, key, key + 1).argsort()  # the retained rows first, in random order
    following = torch.where(rows + 1 < keep.sum(), rows + 1, 0)
    partner = torch.empty_like(rows).scatter_(0, ring, ring[following])
    return torch.where(keep, partner, rows)


def mixing_weight(confidence: Tensor, partner_confidence: Tensor) -> Tensor:
    """Weight of the first image of a pair: psi = o_i / (o_i + o_j), detached.

    Args:
        confidence: o_i, ``(b,)``, in (0, 1].
        partner_confidence: o_j, ``(b,)``, in (0, 1].

    Returns:
        psi, ``(b,)``, float32, in (0, 1).
    Source: Semi-ViM Eq. (12).
    """
    first, second = confidence.detach().float(), partner_confidence.detach().float()
    return first / (first + second)


def mix_inputs(images: Tensor, partner: Tensor, weight: Tensor) -> Tensor:
    """x_mix = psi x_i + (1 - psi) x_j.

    Args:
        images: ``(b, c, h, w)``.
        partner: Row of x_j for each x_i, ``(b,)``, int64.
        weight: psi, ``(b,)``.

    Returns:
        ``(b, c, h, w)``, in the dtype of ``images``.
    Source: Semi-ViM Eq. (13), left.
    """
    psi = weight.to(images.dtype).view(-1, 1, 1, 1)
    return psi * images + (1 - psi) * images[partner]


def mix_targets(pseudo: Tensor, partner: Tensor, weight: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """y_mix = psi y_i + (1 - psi) y_j, of one-hot or soft pseudo-labels, detached.

    Args:
        pseudo: Pseudo-labels, ``(b,)``, int64, in [0, num_classes), or class probabilities ``(b, k)``.
        partner: Row of y_j for each y_i, ``(b,)``, int64.
        weight: psi, ``(b,)``.
        num_classes: k.
        smoothing: Share of each target spread evenly over all classes, in [0, 1).

    Returns:
        ``(b, k)``, float32, rows sum to 1.
    Source: Semi-ViM Eq. (13), right; smoothing as in timm's Mixup.
    """
    if pseudo.ndim == 2:
        target = pseudo.detach().float()
    else:
        target = torch.zeros(pseudo.shape[0], num_classes, device=pseudo.device).scatter_(1, pseudo.view(-1, 1), 1.0)
    target = target * (1 - smoothing) + smoothing / num_classes
    psi = weight.detach().float().view(-1, 1)
    return psi * target + (1 - psi) * target[partner]


def cutmix_boxes(weight: Tensor, height_px: int, width_px: int) -> tuple[Tensor, Tensor]:
    """Draw one box an image that leaves about a share ``weight`` of it outside.

    The box has the image's aspect ratio and a uniform centre, and is clipped at the border.

    Args:
        weight: Wanted share outside the box, ``(b,)``, in [0, 1].
        height_px: Image height.
        width_px: Image width.

    Returns:
        Mask that is True inside the box, ``(b, 1, h, w)``, and the share outside the clipped box, ``(b,)``, float32.
    Source: Yun et al. 2019 (arXiv:1905.04899), Eq. (2).
    """
    share = (1 - weight).clamp(min=0).sqrt()

    def inside(size_px: int) -> Tensor:
        half = size_px * share // 2
        centre = (torch.rand(weight.shape[0], device=weight.device) * size_px).floor()
        position = torch.arange(size_px, device=weight.device)
        return (position >= (centre - half)[:, None]) & (position < (centre + half)[:, None])

    box = (inside(height_px)[:, :, None] & inside(width_px)[:, None, :])[:, None]
    return box, 1 - box.float().mean(dim=(1, 2, 3))


def mix_probabilistic(
    images: Tensor,
    pseudo: Tensor,
    confidence: Tensor,
    num_classes: int,
    switch_prob: float = 0.5,
    smoothing: float = 0.1,
) -> MixedBatch:
    """Mix each image with a random partner, by a box or pixel by pixel, in the ratio of their confidences.

    The partner comes from a random permutation of the whole batch, confident or not.

    Args:
        images: ``(b, c, h, w)``.
        pseudo: Pseudo-labels, ``(b,)``, int64, in [0, num_classes), or class probabilities ``(b, k)``.
        confidence: o, ``(b,)``, in (0, 1].
        num_classes: k.
        switch_prob: Probability, for each image, of a box (CutMix) instead of a blend (Mixup).
        smoothing: Share of each target spread evenly over all classes, in [0, 1).

    Returns:
        The mixed batch; targets follow the share of the clipped box where a box was cut.
    Source: Cai et al. 2022, Semi-ViT (arXiv:2208.05688), probabilistic pseudo mixup.
    """
    b, _, h, w = images.shape
    partner = torch.randperm(b, device=images.device)
    weight = mixing_weight(confidence, confidence[partner])
    by_box = torch.rand(b, device=images.device) < switch_prob
    box, box_weight = cutmix_boxes(weight, h, w)
    blended = mix_inputs(images, partner, weight)
    pasted = torch.where(box, images[partner], images)
    weight = torch.where(by_box, box_weight, weight)
    return MixedBatch(
        images=torch.where(by_box.view(-1, 1, 1, 1), pasted, blended),
        targets=mix_targets(pseudo, partner, weight, num_classes, smoothing),
        partner=partner,
    )
