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
from semivim.layers.plain_module import is_plain, is_plain_causal_conv
from semivim.layers.ssmixup_readout import SSMIXUP_C, add_crossed_readout, own_readout_weights
from semivim.ops import mixer
from semivim.ops.causal_conv import causal_conv
from semivim.ops.eager import is_eager
from semivim.ops.mixer import DirectionWeights, mix_tokens
from semivim.ops.scan import Direction, scan

decay_rate = register_notrace_function(mixer.decay_rate)
# What looks at its arguments is one node to torch.fx, as it is to timm's tracer.
torch.fx.wrap("decay_rate")
torch.fx.wrap("own_readout_weights")
torch.fx.wrap("add_crossed_readout")


def call_conv(conv: nn.Module, x: Tensor, reverse: bool) -> Tensor:
    """Apply a causal convolution and SiLU to ``(b, l, e)`` by calling the module, on flipped tokens if reversed."""
    x = x.flip(1) if reverse else x
    u = F.silu(conv(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
    return u.flip(1) if reverse else u


class BidirectionalMamba(nn.Module):
    """Mix tokens by two selective scans, first to last and last to first, that share both projections.

    ``y = (SiLU(z) (s_f + D u_f + s_b + D_b u_b) + nu C h_mix) / 2``, with ``s_t = <C_t, h_t>`` of each direction and
    ``h_mix = psi h_f + (1 - psi) h_b``. The halving is Vim's ``if_divide_out``; ``nu C h_mix`` stands inside it.

    ``ssmixup_c`` says which C reads ``h_mix`` (see `semivim.layers.ssmixup_readout`).

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
        xz = self.in_proj(x)
        # Nested, as TorchScript compiles what stands behind an `and`.
        if not torch.jit.is_scripting():  # noqa: SIM102
            if is_eager(xz) and (psi is None or self.ssmixup_c == "own"):
                weights = self._weights(("", "_b"))
                if weights is not None:
                    mix = own_readout_weights(self.ssmixup_c, psi, nu)
                    return self.out_proj(mix_tokens(xz, weights, [False, True], mix, 0.5))
        u, z = xz.chunk(2, dim=-1)
        u, u_b = self.convolve(u)
        f, g = self.direction(u, False), self.direction(u_b, True)
        y = scan([f, g], z, own_readout_weights(self.ssmixup_c, psi, nu), 0.5)
        return self.out_proj(add_crossed_readout(y, self.ssmixup_c, f, g, psi, nu))

    @torch.jit.ignore
    def one_direction(self, x: Tensor, backward: bool) -> Tensor:
        """Mix tokens by one direction's parameters, from the first token to the last: no token sees a later one.

        ``y = SiLU(z) (s + D u)``, not halved, as `forward` gives it where both directions agree. Nothing is computed
        for the other direction.

        Args:
            x: Tokens, ``(b, l, d)``; for the backward parameters in reversed order, as those see them in `forward`.
            backward: Whether to use the ``*_b`` parameters.

        Returns:
            ``(b, l, d)``, in the order of ``x``.

        Source: Ren et al. 2025, "Autoregressive Pretraining with Mamba in Vision" (ARM).
        """
        xz = self.in_proj(x)
        weights = self._weights(("_b" if backward else "",)) if is_eager(xz) else None
        if weights is not None:
            return self.out_proj(mix_tokens(xz, weights, [False]))
        u, z = xz.chunk(2, dim=-1)
        conv = self.conv1d_b if backward else self.conv1d
        if is_plain_causal_conv(conv) and conv.bias is not None:
            (u,) = causal_conv(u, [(conv.weight, conv.bias)], [False])
        else:
            u = call_conv(conv, u, False)
        return self.out_proj(scan([self.direction(u, backward)._replace(reverse=False)], z))

    @torch.jit.ignore
    def twins(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Return each parameter of the forward direction with that of the backward direction."""
        layers = ((self.conv1d, self.conv1d_b), (self.x_proj, self.x_proj_b), (self.dt_proj, self.dt_proj_b))
        of_layers = [pair for f, b in layers for pair in zip(f.parameters(), b.parameters(), strict=True)]
        return [(self.A_log, self.A_b_log), (self.D, self.D_b), *of_layers]

    @torch.jit.ignore
    def _weights(self, ends: tuple[str, ...]) -> list[DirectionWeights] | None:
        """Weights between the outer projections; None where a layer must be called to use them.

        Args:
            ends: Ending of the names of each direction's parameters.
        """
        # From the modules' dictionaries: thirty look-ups of attributes would cost as much as the scan of a small block.
        layers, own = self._modules, self._parameters
        directions = []
        for end in ends:
            conv, x_proj, dt_proj = layers["conv1d" + end], layers["x_proj" + end], layers["dt_proj" + end]
            assert conv is not None and x_proj is not None and dt_proj is not None
            if not (is_plain_causal_conv(conv) and is_plain(x_proj, Linear) and is_plain(dt_proj, nn.Linear)):
                return None
            tensors = (
                *(conv._parameters["weight"], conv._parameters["bias"], x_proj._parameters["weight"]),
                *(
                    dt_proj._parameters["weight"],
                    dt_proj._parameters["bias"],
                    own.get(f"A{end}_log"),
                    own.get("D" + end),
                ),
            )
            if any(x is None for x in tensors):  # a layer without bias, or a parametrised or pruned parameter
                return None
            directions.append(DirectionWeights(*tensors))  # type: ignore[arg-type]
        return directions

    def __prepare_scriptable__(self) -> "BidirectionalMamba":
        """Refuse TorchScript where a layer must be called: a script cannot ask what a module is, and uses its weights.

        Raises:
            ValueError: If a layer between the outer projections was replaced, hooked, parametrised or pruned.
        """
        if self._weights(("", "_b")) is None:
            raise ValueError("the mixer cannot be scripted: a layer of it is replaced, hooked, parametrised or pruned")
        return self

    def convolve(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve tokens causally in both directions: ``(b, l, e)`` to u and u_b, ``(b, l, e)`` each."""
        if torch.jit.is_scripting():
            bias, bias_b = self.conv1d.bias, self.conv1d_b.bias
            assert bias is not None and bias_b is not None
            outputs = causal_conv(x, [(self.conv1d.weight, bias), (self.conv1d_b.weight, bias_b)], [False, True])
            return outputs[0], outputs[1]
        f, g = self.conv1d, self.conv1d_b
        if is_plain_causal_conv(f) and is_plain_causal_conv(g):
            assert f.bias is not None and g.bias is not None
            outputs = causal_conv(x, [(f.weight, f.bias), (g.weight, g.bias)], [False, True])
            return outputs[0], outputs[1]
        return call_conv(f, x, False), call_conv(g, x, True)

    def direction(self, u: Tensor, reverse: bool) -> Direction:
        """Project one direction's convolved tokens to the operands of its scan.

        Args:
            u: Convolved tokens, ``(b, l, e)``.
            reverse: Whether it is the backward direction, with the ``*_b`` parameters.

        Returns:
            The operands; results of the scan stay at their tokens.
        """
        r = self.dt_rank
        dbc = self.x_proj_b(u) if reverse else self.x_proj(u)  # [dt | B | C]
        A = decay_rate(self.A_b_log if reverse else self.A_log)
        D = self.D_b if reverse else self.D
        if torch.jit.is_scripting():
            bias: Tensor = self.dt_proj_b.bias if reverse else self.dt_proj.bias
            delta = F.linear(dbc[..., :r], self.dt_proj_b.weight if reverse else self.dt_proj.weight)
        else:
            dt_proj = self.dt_proj_b if reverse else self.dt_proj
            if is_plain(dt_proj, nn.Linear) and dt_proj.bias is not None:
                # The scan adds the bias itself, in float32.
                delta, bias = F.linear(dbc[..., :r], dt_proj.weight), dt_proj.bias
            else:
                delta, bias = dt_proj(dbc[..., :r]), torch.zeros_like(D)
        return Direction(u, delta, dbc[..., r:], A, D, bias, reverse)
