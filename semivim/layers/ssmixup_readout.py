"""SSMixup's read-out of the hidden states, ``nu C h_mix`` with ``h_mix = psi h_f + (1 - psi) h_b``.

Semi-ViM Eq. (14)-(16). It writes one C for both directions where Vim has two, so a choice says which C reads ``h_mix``:
each direction's ``own`` (no extra scan, equal to the paper wherever both C are one), the forward one (``fwd``), the
backward one (``bwd``) or the ``mean`` of these two. Where a direction's states are read by its own C, the scan adds
them (its `mix`); where by the other direction's C, a scan of their own does.

Dimensions: ``b`` batch, ``l`` tokens, ``e`` channels inside the mixer, ``n`` states. psi and nu have no gradient.
"""

import torch
from timm.layers import register_notrace_function
from torch import Tensor

from semivim.ops.scan import Direction, scan

SSMIXUP_C = ("own", "fwd", "bwd", "mean")


@register_notrace_function
def own_readout_weights(ssmixup_c: str, psi: Tensor | None, nu: Tensor | None) -> Tensor | None:
    """Return the weights with which each direction's states, read by their own C, enter ``nu C h_mix``.

    Args:
        ssmixup_c: One of `SSMIXUP_C`.
        psi: Share of the forward states, ``(b,)``; None for no mix.
        nu: Strength of the mixed states, ``(b,)``; None for no mix.

    Returns:
        ``(b, 2)``, forward and backward direction, without gradient; None for no mix.
    """
    if psi is None or nu is None:
        return None
    psi, nu = psi.detach(), nu.detach()
    if ssmixup_c == "mean":
        nu = nu / 2
    forward, backward = nu * psi, nu * (1 - psi)
    if ssmixup_c == "fwd":
        backward = torch.zeros_like(backward)
    if ssmixup_c == "bwd":
        forward = torch.zeros_like(forward)
    return torch.stack([forward, backward], 1)


def _read_by(f: Direction, other: Direction) -> Tensor:
    """``<C_t, h_t>`` of one direction's states and the other direction's C, ``(b, l, e)``."""
    n = f.A.shape[1]
    bc = torch.cat([f.bc[..., :n], other.bc[..., n:]], -1)
    return scan([Direction(f.u, f.delta, bc, f.A, torch.zeros_like(f.D), f.delta_bias, f.reverse)])


@register_notrace_function
def add_crossed_readout(
    y: Tensor, ssmixup_c: str, forward: Direction, backward: Direction, psi: Tensor | None, nu: Tensor | None
) -> Tensor:
    """Add the part of ``nu C h_mix / 2`` that reads one direction's states by the other direction's C.

    Args:
        y: The mixer's output so far, ``(b, l, e)``.
        ssmixup_c: One of `SSMIXUP_C`.
        forward: Operands of the forward direction's scan.
        backward: Operands of the backward direction's scan.
        psi: Share of the forward states, ``(b,)``; None for no mix.
        nu: Strength of the mixed states, ``(b,)``; None for no mix.

    Returns:
        ``(b, l, e)``.
    """
    if psi is None or nu is None or ssmixup_c == "own":
        return y
    psi, nu = psi.detach(), nu.detach()
    strength = nu / 4 if ssmixup_c == "mean" else nu / 2
    if ssmixup_c != "fwd":
        y = y + ((strength * psi).view(-1, 1, 1) * _read_by(forward, backward)).to(y.dtype)
    if ssmixup_c != "bwd":
        y = y + ((strength * (1 - psi)).view(-1, 1, 1) * _read_by(backward, forward)).to(y.dtype)
    return y
