"""VMamba's mixer: a depthwise convolution and four selective scans of the map, by rows and by columns, both ways.

Dimensions: ``b`` batch, ``h`` rows, ``w`` columns, ``c`` channels of the model, ``d = ssm_ratio * c`` channels inside,
``n`` states, ``r`` rank of the step size. Maps are channel-last, ``(b, h, w, d)``, so only what the columns' scans read
and write is transposed, once each way; the scans against the order of the tokens flip nothing.
"""

import math
from typing import Any

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn
from torch.nn import functional as F

from semivim.layers.linear import Linear
from semivim.ops import mixer
from semivim.ops.linear import linear
from semivim.ops.scan import Direction, scan

DIRECTIONS = 4  # rows, columns, rows from the last token on, columns from the last token on
decay_rate = register_notrace_function(mixer.decay_rate)
torch.fx.wrap("decay_rate")
torch.fx.wrap("widen")


@register_notrace_function
def widen(x: Tensor) -> Tensor:
    """Return a tensor in float32, float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def transposed(x: Tensor) -> Tensor:
    """Rows for columns of a map ``(b, h, w, d)``, copied to ``(b, w, h, d)``."""
    return x.transpose(1, 2).contiguous()


class ScanNorm(nn.LayerNorm):
    """Layer norm in the dtype of its input, under autocast and with weights of lower precision, too."""

    def forward(self, y: Tensor) -> Tensor:
        return F.layer_norm(y, self.normalized_shape, self.weight.to(y.dtype), self.bias.to(y.dtype), self.eps)


class SS2D(nn.Module):
    """Mix a map by selective scans in four directions, whose sum is normalised.

    ``y = LN(sum_k s_k + D_k u)`` with ``u = SiLU(conv3x3(in_proj(x)))``, and ``s_k`` the selective scan of u with step
    size, B and C of its own direction k; ``gated`` multiplies by ``SiLU(z)``, z another half of ``in_proj``'s output.
    Scans, their A, D and step bias, and the norm are computed in float32 (float64 stays) under autocast and in a model
    of lower precision. Parameters have the released names, shapes and order of directions.

    Args:
        dim: Channels of the map.
        ssm_ratio: Channels inside per channel outside.
        d_state: States per channel.
        gated: Whether the sum is gated; the convolution then has a bias.

    Source: Liu et al. 2024 (arXiv:2401.10166), section 4.2; MzeroMiko/VMamba, ``SS2D`` with ``forward_type`` ``v0``
        (gated) and ``v05_noz``.
    """

    def __init__(
        self,
        dim: int,
        ssm_ratio: int = 2,
        d_state: int = 1,
        gated: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, rank = ssm_ratio * dim, math.ceil(dim / 16)
        self.dt_rank, self.d_state, self.gated = rank, d_state, gated
        self.in_proj = Linear(dim, 2 * inner if gated else inner, **dd)
        self.conv2d = nn.Conv2d(inner, inner, 3, groups=inner, padding=1, bias=gated, **dd)
        self.x_proj_weight = nn.Parameter(torch.empty(DIRECTIONS, rank + 2 * d_state, inner, **dd))
        self.dt_projs_weight = nn.Parameter(torch.empty(DIRECTIONS, inner, rank, **dd))
        self.dt_projs_bias = nn.Parameter(torch.empty(DIRECTIONS, inner, **dd))
        self.A_logs = nn.Parameter(torch.empty(DIRECTIONS * inner, d_state, **dd))
        self.Ds = nn.Parameter(torch.empty(DIRECTIONS * inner, **dd))
        self.out_norm = ScanNorm(inner, eps=1e-5, **dd)
        self.out_proj = Linear(inner, dim, **dd)
        self._init_scans()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draw the scans' own parameters again; the layers have a `reset_parameters` of their own."""
        self._init_scans()

    @torch.jit.ignore
    @torch.no_grad()
    def _init_scans(self) -> None:
        bound = self.x_proj_weight.shape[-1] ** -0.5  # the default of a linear layer
        self.x_proj_weight.uniform_(-bound, bound)
        bound = self.dt_rank**-0.5
        self.dt_projs_weight.uniform_(-bound, bound)
        bias = self.dt_projs_bias
        log_step = torch.empty_like(bias, dtype=torch.float32).uniform_(math.log(1e-3), math.log(0.1))
        step = log_step.exp().clamp(min=1e-4)
        bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        states = torch.arange(1, self.d_state + 1, device=self.A_logs.device, dtype=torch.float32)
        self.A_logs.copy_(states.log().expand_as(self.A_logs))
        self.Ds.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map, ``(b, h, w, c)`` to the same."""
        x = self.in_proj(x)
        z = x
        if self.gated:
            x, z = x.chunk(2, dim=-1)
        u = F.silu(self.conv2d(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1).contiguous()
        y = self.out_norm(self.scan(u)).to(u.dtype)
        if self.gated:
            y = y * F.silu(z)
        return self.out_proj(y)

    def scan(self, u: Tensor) -> Tensor:
        """Sum of the four scans of a convolved map ``(b, h, w, d)``, float32 (float64 stays)."""
        b, h, w, d = u.shape
        directions, per_direction = self.x_proj_weight.shape[0], self.x_proj_weight.shape[1]
        # A projection acts on each token alone, so it comes before the columns are gathered.
        dbc = self.project(u).view(b, h, w, directions, per_direction)
        u = widen(u)
        rows = self.both_ways(u.view(b, h * w, d), dbc[:, :, :, 0::2].reshape(b, h * w, 2, per_direction), 0)
        columns = self.both_ways(
            transposed(u).view(b, w * h, d),
            dbc[:, :, :, 1::2].transpose(1, 2).reshape(b, w * h, 2, per_direction),
            1,
        )
        return rows.view(b, h, w, d) + columns.view(b, w, h, d).transpose(1, 2)

    def project(self, u: Tensor) -> Tensor:
        """Step sizes of low rank, B and C of all directions, ``(b, h, w, 4 (r + 2n))``."""
        weight = self.x_proj_weight.flatten(0, 1)
        if not torch.jit.is_scripting():
            return linear(u, weight)
        return F.linear(u, weight)

    def both_ways(self, u: Tensor, dbc: Tensor, first: int) -> Tensor:
        """Sum of a scan and its reverse: of the directions ``first`` and ``first + 2``.

        Args:
            u: Tokens in the order of the scan, ``(b, l, d)``.
            dbc: Their step sizes of low rank, B and C for both directions, ``(b, l, 2, r + 2n)``.
            first: 0 for rows, 1 for columns.
        """
        return scan([self.direction(u, dbc[:, :, 0], first, False), self.direction(u, dbc[:, :, 1], first + 2, True)])

    def direction(self, u: Tensor, dbc: Tensor, k: int, reverse: bool) -> Direction:
        """Operands of the scan in direction k."""
        r, d = self.dt_rank, u.shape[-1]
        delta = F.linear(dbc[..., :r], self.dt_projs_weight[k])
        A = decay_rate(self.A_logs[k * d : (k + 1) * d])
        return Direction(u, delta, dbc[..., r:], A, self.Ds[k * d : (k + 1) * d], self.dt_projs_bias[k], reverse)
