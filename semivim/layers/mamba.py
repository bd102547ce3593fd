"""The bidirectional Mamba mixer of Vision Mamba, with SSMixup's read-out of the hidden states.

Dimensions: ``b`` batch, ``l`` tokens, ``d`` channels of the model, ``e = expand * d`` channels inside, ``n`` states,
``r`` rank of the step size. Every tensor is channel-last, so nothing is copied between ``in_proj`` and ``out_proj``.
"""

import math
from typing import Any

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn
from torch.nn import functional as F

from semivim.layers.linear import Linear
from semivim.ops import onnx_graph
from semivim.ops.causal_conv import bidirectional_conv
from semivim.ops.scan import bidirectional_scan, selective_scan

SSMIXUP_C = ("own", "fwd", "bwd", "mean")


def convolve(x: Tensor, weight: Tensor, bias: Tensor, weight_b: Tensor, bias_b: Tensor) -> tuple[Tensor, Tensor]:
    """`bidirectional_conv`; while the ONNX exporter traces, torch operations that it can translate."""
    # Nested, as TorchScript compiles what stands behind an `and`.
    if not torch.jit.is_scripting():  # noqa: SIM102
        if torch.onnx.is_in_onnx_export():
            return onnx_graph.bidirectional_conv(x, weight, bias, weight_b, bias_b)
    return bidirectional_conv(x, weight, bias, weight_b, bias_b)


def scan(operands: list[Tensor], psi: Tensor | None, nu: Tensor | None) -> Tensor:
    """`bidirectional_scan` of its thirteen operands; while the ONNX exporter traces, one Scan node."""
    u, u_b, delta, delta_b, bc, bc_b, z, A, A_b, D, D_b, bias, bias_b = operands
    if not torch.jit.is_scripting():  # noqa: SIM102
        if torch.onnx.is_in_onnx_export():
            return onnx_graph.bidirectional_scan(
                u, u_b, delta, delta_b, bc, bc_b, z, A, A_b, D, D_b, bias, bias_b, psi, nu
            )
    return bidirectional_scan(u, u_b, delta, delta_b, bc, bc_b, z, A, A_b, D, D_b, bias, bias_b, psi, nu)


@register_notrace_function
def decay_rate(A_log: Tensor) -> Tensor:
    """``A = -exp(A_log)``, in float32 whatever the model's dtype (float64 stays)."""
    wide = A_log if A_log.dtype == torch.float64 else A_log.float()
    return -torch.exp(wide)


@register_notrace_function
def readout_weights(reading: str, psi: Tensor | None, nu: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Weights with which each direction's own read-out enters ``nu C h_mix``; None passes through.

    Returns:
        psi' and nu' such that ``nu' (psi' s_f + (1 - psi') s_b)`` is that part of Semi-ViM Eq. (16).
    """
    if psi is None or nu is None or reading == "own":
        return psi, nu
    if reading == "fwd":
        return torch.ones_like(psi), nu * psi
    if reading == "bwd":
        return torch.zeros_like(psi), nu * (1 - psi)
    return psi, nu / 2


def crossed_scan(operands: list[Tensor], bc_other: Tensor, reverse: bool) -> Tensor:
    """``<C_t, h_t>`` of one direction's states and the other direction's C, ``(b, l, e)``."""
    u, delta, bc, A, delta_bias = operands
    n = A.shape[1]
    B, C = bc[..., :n].transpose(1, 2), bc_other[..., n:].transpose(1, 2)
    s = selective_scan(u.transpose(1, 2), delta.transpose(1, 2), A, B, C, None, None, delta_bias, True, reverse)
    return s.transpose(1, 2)


@register_notrace_function
def add_crossed_readout(
    y: Tensor,
    reading: str,
    forward: list[Tensor],
    backward: list[Tensor],
    psi: Tensor | None,
    nu: Tensor | None,
) -> Tensor:
    """Add the part of ``nu C h_mix / 2`` that reads one direction's states with the other direction's C.

    Args:
        y: The mixer's output so far, ``(b, l, e)``.
        reading: One of `SSMIXUP_C`.
        forward: u ``(b, l, e)``, delta ``(b, l, e)``, [B | C] ``(b, l, 2n)``, A ``(e, n)``, bias of delta ``(e,)``.
        backward: The same of the backward direction, at the same tokens.
        psi: Share of the forward states, ``(b,)``.
        nu: Strength of the mixed states, ``(b,)``.
    """
    if psi is None or nu is None or reading == "own":
        return y
    psi, nu = psi.detach(), nu.detach()  # constants of a step, as in the op that adds the other part
    strength = nu / 4 if reading == "mean" else nu / 2
    if reading != "fwd":
        s = crossed_scan(forward, backward[2], False)
        y = y + ((strength * psi).view(-1, 1, 1) * s).to(y.dtype)
    if reading != "bwd":
        s = crossed_scan(backward, forward[2], True)
        y = y + ((strength * (1 - psi)).view(-1, 1, 1) * s).to(y.dtype)
    return y


class BidirectionalMamba(nn.Module):
    """Mix tokens by two selective scans, first to last and last to first, that share both projections.

    ``y = (SiLU(z) (s_f + D u_f + s_b + D_b u_b) + nu C h_mix) / 2``, with ``s_t = <C_t, h_t>`` of each direction and
    ``h_mix = psi h_f + (1 - psi) h_b``. The halving is Vim's ``if_divide_out``; ``nu C h_mix`` stands inside it.

    Semi-ViM writes one C for both directions where Vim has two, so ``ssmixup_c`` says which C reads ``h_mix``: each
    direction's ``own`` (no extra scan, equal to the paper wherever both C are one), the forward one (``fwd``), the
    backward one (``bwd``) or the ``mean`` of these two.

    Args:
        dim: Channels of the tokens.
        d_state: States per channel.
        d_conv: Taps of the causal convolutions.
        expand: Channels inside per channel outside.
        ssmixup_c: One of ``own``, ``fwd``, ``bwd``, ``mean``.

    Raises:
        ValueError: If ``ssmixup_c`` is none of these.
    Source: Zhu et al. 2024 (arXiv:2401.09417), Algorithm 1 with its released ``bimamba_type="v2"``; Semi-ViM
        Eq. (14)-(16).
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        ssmixup_c: str = "own",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if ssmixup_c not in SSMIXUP_C:
            raise ValueError(f"ssmixup_c is {ssmixup_c!r}, wanted one of {SSMIXUP_C}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, rank = expand * dim, math.ceil(dim / 16)
        self.d_state = d_state
        self.dt_rank = rank
        self.ssmixup_c = ssmixup_c
        self.A_log = nn.Parameter(torch.empty(inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(inner, **dd))
        self.A_b_log = nn.Parameter(torch.empty(inner, d_state, **dd))
        self.D_b = nn.Parameter(torch.empty(inner, **dd))
        self.in_proj = Linear(dim, 2 * inner, **dd)
        # The convolutions and step-size projections hold parameters only: the ops of forward apply them.
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1, **dd)
        self.x_proj = Linear(inner, rank + 2 * d_state, **dd)
        self.dt_proj = nn.Linear(rank, inner, **dd)
        self.conv1d_b = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1, **dd)
        self.x_proj_b = Linear(inner, rank + 2 * d_state, **dd)
        self.dt_proj_b = nn.Linear(rank, inner, **dd)
        self.out_proj = Linear(inner, dim, **dd)
        self._init_ssm()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        for linear in (self.in_proj, self.x_proj, self.dt_proj, self.x_proj_b, self.dt_proj_b, self.out_proj):
            linear.reset_parameters()
        for conv in (self.conv1d, self.conv1d_b):
            conv.reset_parameters()
        self._init_ssm()

    @torch.jit.ignore
    @torch.no_grad()
    def _init_ssm(self) -> None:
        """Initialise what does not keep PyTorch's default law."""
        states = torch.arange(1, self.d_state + 1, device=self.A_log.device, dtype=torch.float32)
        for A_log, D in ((self.A_log, self.D), (self.A_b_log, self.D_b)):
            A_log.copy_(states.log().expand_as(A_log))
            D.fill_(1.0)
        bias = self.dt_proj.bias
        log_step = torch.empty_like(bias, dtype=torch.float32).uniform_(math.log(1e-3), math.log(0.1))
        step = log_step.exp().clamp(min=1e-4)
        bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        # Vim zeroes the bias of every linear layer but dt_proj: the backward step size starts near 0.69.
        self.dt_proj_b.bias.zero_()

    def forward(self, x: Tensor, psi: Tensor | None = None, nu: Tensor | None = None) -> Tensor:
        """Mix tokens.

        Args:
            x: Tokens, ``(b, l, d)``.
            psi: Share of the forward states in ``h_mix``, ``(b,)``, or None.
            nu: Strength of ``C h_mix``, ``(b,)``, or None for no such term.

        Returns:
            ``(b, l, d)``.
        """
        u, z = self.in_proj(x).chunk(2, dim=-1)
        conv_bias, conv_bias_b = self.conv1d.bias, self.conv1d_b.bias
        assert conv_bias is not None and conv_bias_b is not None
        u, u_b = convolve(u, self.conv1d.weight, conv_bias, self.conv1d_b.weight, conv_bias_b)
        r = self.dt_rank
        dbc, dbc_b = self.x_proj(u), self.x_proj_b(u_b)  # [dt | B | C]
        bc, bc_b = dbc[..., r:], dbc_b[..., r:]
        # The scan adds the bias of delta itself, in float32.
        delta = F.linear(dbc[..., :r], self.dt_proj.weight)
        delta_b = F.linear(dbc_b[..., :r], self.dt_proj_b.weight)
        A, A_b = decay_rate(self.A_log), decay_rate(self.A_b_log)
        bias, bias_b = self.dt_proj.bias, self.dt_proj_b.bias
        psi_own, nu_own = readout_weights(self.ssmixup_c, psi, nu)
        y = scan([u, u_b, delta, delta_b, bc, bc_b, z, A, A_b, self.D, self.D_b, bias, bias_b], psi_own, nu_own)
        y = add_crossed_readout(y, self.ssmixup_c, [u, delta, bc, A, bias], [u_b, delta_b, bc_b, A_b, bias_b], psi, nu)
        return self.out_proj(y)
