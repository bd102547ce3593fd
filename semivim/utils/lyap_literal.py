"""Algorithm 1 of Semi-ViM as printed, for study: it stops training within about 20 steps.

V starts at 0 and can only rise, so the first test fails, and each failure halves the learning rate for good.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from semivim.utils.lyapunov import Pairs, lyapunov_value


class LiteralStep(NamedTuple):
    """One step of the algorithm: its alpha, and what became of the student, lambda and the learning rate.

    ``distance`` is d of the student as it was left, ``teacher_norm`` the norm of the teacher's weights, ``violated``
    says that V did not fall at first, ``pull`` is lambda, ``lr_factor`` what the learning rate is multiplied by.
    """

    alpha: float
    distance: float
    teacher_norm: float
    violated: bool
    pull: float
    lr_factor: float


def literal_step(
    pairs: Pairs,
    before: Sequence[Tensor],
    measure: Callable[[], tuple[float, float]],
    decay: Callable[[float, float], float],
    v_prev: float,
    *,
    pull: float,
    pull_step: float,
) -> LiteralStep | None:
    """Pull the student towards the teacher (Eq. 8), once more with half the step and a larger pull if V did not fall.

    The optimizer's displacement is linear in the learning rate, so half of it is what half the rate would have given.

    Args:
        pairs: Student as the optimizer left it, and teacher; the student is moved.
        before: Parameters of the student before the optimizer's step.
        measure: Gives d and the norm of the teacher's weights.
        decay: Gives alpha of them, Eq. (9).
        v_prev: V of the step before.
        pull: lambda.
        pull_step: What a failed test adds to it.

    Returns:
        What was done; None if the student is not finite, which is then left as the optimizer left it.

    Source: Semi-ViM Algorithm 1.
    """
    after = [s.clone() for s in pairs.student]
    lr_factor = 1.0
    _place(pairs, before, after, lr_factor, pull)
    distance, norm = measure()
    alpha = decay(distance, norm)
    violated = lyapunov_value(alpha, distance) >= v_prev
    if violated:
        lr_factor = 0.5
        pull += pull_step
        _place(pairs, before, after, lr_factor, pull)
        distance, norm = measure()
        alpha = decay(distance, norm)
    if not (math.isfinite(distance) and math.isfinite(norm)):
        torch._foreach_copy_(pairs.student, after)
        return None
    return LiteralStep(alpha, distance, norm, violated, pull, lr_factor)


def _place(pairs: Pairs, before: Sequence[Tensor], after: Sequence[Tensor], lr_factor: float, pull: float) -> None:
    """Write Eq. (8) with the right-hand side at t-1, the optimizer's step scaled by ``lr_factor``."""
    for s, s0, u, t in zip(pairs.student, before, after, pairs.teacher, strict=True):
        s.copy_(s0 + lr_factor * (u - s0) + pull * (t - s0))
