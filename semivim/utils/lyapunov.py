"""Quantities of LyapEMA's controller (Semi-ViM section 4.1); notation as in lyap_ema.py."""

import math
from typing import NamedTuple

import torch

V_DECREASE = 1e-3  # outside the ball V must lose this share at every step


class LyapStats(NamedTuple):
    """What one update did; plain numbers, nan where the mode does not measure them.

    ``alpha`` is the decay used, ``v`` and ``v_prev`` are V_t and V_{t-1}, ``bound`` is what V was held to, ``distance``
    is d, ``teacher_norm`` the norm of the teacher's weights, ``pull`` is lambda (in the projecting modes the one that
    the projection amounts to, 1/c - 1), ``lr_scale`` is the product of the halvings of mode ``literal``, ``violated``
    says that V failed its test, ``skipped`` that student and teacher were left alone.
    """

    alpha: float
    v: float
    v_prev: float
    bound: float
    distance: float
    teacher_norm: float
    pull: float
    lr_scale: float
    violated: bool
    skipped: bool


class Pairs(NamedTuple):
    """Trainable parameters of student and teacher in order, and those of the teacher that are weights."""

    student: list[torch.Tensor]
    teacher: list[torch.Tensor]
    weights: list[torch.Tensor]


def adaptive_decay(distance: float, gamma: float, min_decay: float, decay: float) -> float:
    """Decay min_decay + (decay - min_decay) (2 sigmoid(gamma distance) - 1); Eq. (9) when they are 0.5 and 1."""
    return min_decay + (decay - min_decay) * math.tanh(0.5 * gamma * distance)


def lyapunov_value(alpha: float, distance: float) -> float:
    """V_t = 0.5 (alpha d)^2, which is 0.5 ||S_t - T_t||^2 of Eq. (6)."""
    return 0.5 * (alpha * distance) ** 2


def lyapunov_bound(v_prev: float, teacher_norm: float, radius: float) -> float:
    """Largest V allowed: free inside a ball of ``radius`` times the norm of the teacher's weights, else falling."""
    return max((1.0 - V_DECREASE) * v_prev, 0.5 * (radius * teacher_norm) ** 2)


def projection_factor(bound: float, alpha: float, distance: float) -> float:
    """The c for which V = bound if S = T + c (u - T) and alpha is kept.

    As alpha does not grow when the distance shrinks, V <= bound holds with the alpha of the shorter distance too. It is
    Algorithm 1's "increase lambda and recompute" in closed form, with lambda = 1/c - 1.
    """
    return math.sqrt(2.0 * bound) / (alpha * distance)
