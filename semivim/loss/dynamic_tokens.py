"""The losses that teach a dynamic Vision Mamba what to leave out: one function per term.

Dimensions: ``s`` routers, ``b`` images, ``m`` patches of the grid, ``d`` channels, ``k`` classes.

Source: Wu et al. 2025, "Dynamic Vision Mamba" (arXiv:2504.04787), and its released ``DyVMLoss_Token_Block``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def token_ratio_loss(kept: Tensor, ratio: float) -> Tensor:
    """Mean over routers and images of ``(share of patches kept - ratio ** s) ** 2``, ``s`` counted from 1.

    Args:
        kept: 1 for patches that a router kept, 0 for others, ``(s, b, m)``.
        ratio: Share that each router is to keep of what the one before it kept.

    Returns:
        Scalar; 0 without routers.
    """
    if not len(kept):
        return kept.new_zeros(())
    wanted = torch.tensor([ratio ** (s + 1) for s in range(len(kept))], dtype=kept.dtype, device=kept.device)
    return (kept.mean(-1) - wanted[:, None]).square().mean()


def gate_ratio_loss(gates: Tensor, ratio: float) -> Tensor:
    """``(share of directions computed - ratio) ** 2`` over all blocks, images and directions together.

    Images are free to differ.

    Args:
        gates: 1 for directions that an image chose, 0 for others, of any shape.
        ratio: Share that is to be chosen.
    """
    return (gates.mean() - ratio).square()


def distillation_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the student's classes from the teacher's, mean over images, temperature 1.

    Args:
        logits: ``(b, k)``.
        teacher_logits: ``(b, k)``; no gradient.
    """
    teacher = teacher_logits.detach().float().log_softmax(-1)
    return F.kl_div(logits.float().log_softmax(-1), teacher, reduction="batchmean", log_target=True)


def kept_token_loss(tokens: Tensor, teacher_tokens: Tensor, kept: Tensor) -> Tensor:
    """Mean squared difference of the patches that are kept to the end from the teacher's at the same places.

    Args:
        tokens: ``(b, m + 1, d)`` after the final norm, the class token, which does not count, in the middle.
        teacher_tokens: ``(b, m + 1, d)``; no gradient.
        kept: 1 for patches that the last router kept, ``(b, m)``; no gradient.

    Returns:
        Scalar; 0 where no patch is left.
    """
    middle = kept.shape[1] // 2
    counts = (kept.detach() > 0.5).float()
    counts = torch.cat([counts[:, :middle], torch.zeros_like(counts[:, :1]), counts[:, middle:]], 1)
    difference = (tokens.float() - teacher_tokens.detach().float()).square().mean(-1)
    return (difference * counts).sum() / counts.sum().clamp(min=1)
