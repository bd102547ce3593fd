"""The bidirectional Mamba mixer of a dynamic Vision Mamba: each image chooses the directions that are computed for it.

Dimensions as in `semivim.layers.mamba`.
"""

from collections.abc import Sequence

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn

from semivim.layers.mamba import BidirectionalMamba
from semivim.layers.token_router import class_token, gumbel_like, straight_through
from semivim.ops.eager import is_eager
from semivim.ops.mixer import DirectionWeights, mix_tokens
from semivim.ops.scan import Direction, scan


@register_notrace_function
def masked(u: Tensor, mask: Tensor | None) -> Tensor:
    """Set tokens ``(b, l, e)`` to 0 where the mask ``(b, l, 1)`` is 0; None for no mask."""
    return u if mask is None else u * mask.to(u.dtype)


_KINDS = ((True, True), (True, False), (False, True))  # forward, backward; images that chose neither stay out

torch.fx.wrap("masked")
torch.fx.wrap("class_token")
torch.fx.wrap("gate_decisions")


def gate_decisions(logits: Tensor, tau: float = 2.0) -> Tensor:
    """Draw which directions an image goes through, 1 or 0, by a straight-through Gumbel-sigmoid.

    Args:
        logits: ``(b, 2)``.
        tau: Temperature of the sigmoid whose gradient is taken.
    """
    logits = logits.float()
    soft = ((logits + gumbel_like(logits) - gumbel_like(logits)) / tau).sigmoid()
    return straight_through((soft > 0.5).to(soft.dtype), soft)


class DynamicMamba(BidirectionalMamba):
    """Vim's mixer with a gate for each direction of each image, and a mask for tokens that were dropped.

    A gate is read off the class token's row of the input projection. The sum of the directions is halved even where one
    is off, as the released weights want it. In evaluation a direction is computed for the images that chose it, and an
    image that chose none skips the mixer. In training, and where a program is recorded (compiled, exported, traced, a
    CUDA graph), gates multiply instead.

    Args:
        dim: Channels of the tokens.
        d_state: States per channel.
        d_conv: Taps of the causal convolutions.
        expand: Channels inside per channel outside.

    Source: Wu et al. 2025, "Dynamic Vision Mamba" (arXiv:2504.04787), and its released ``DynamicMamba``.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, d_state, d_conv, expand, device=device, dtype=dtype)
        self.block_head = nn.Linear(2 * expand * dim, 2, device=device, dtype=dtype)
        self._init_gates()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._init_gates()

    @torch.jit.ignore
    @torch.no_grad()
    def _init_gates(self) -> None:
        """Start with every gate on."""
        nn.init.zeros_(self.block_head.weight)
        nn.init.constant_(self.block_head.bias, 5.0)

    def forward(  # type: ignore[override]
        self, x: Tensor, mask: Tensor | None = None, slot: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mix tokens.

        Args:
            x: Tokens, ``(b, l, d)``.
            mask: 1 for tokens that are read, 0 for dropped ones, which must stand last, ``(b, l, 1)``; None for ones.
            slot: Slot of the class token, ``(b, 1)``; None for the middle.

        Returns:
            ``(b, l, d)``, and what decides on the forward and the backward direction, ``(b, 2)``: in training the gates
            that were drawn, 1 or 0 with the gradient of their probability, otherwise logits, positive for a direction
            that is on.
        """
        # Nested, as TorchScript compiles what stands behind an `and`.
        if not torch.jit.is_scripting():  # noqa: SIM102
            if not self.training and mask is None and _may_branch(x):
                weights = self._weights(("", "_b"))
                if weights is not None:
                    return self._chosen(x, weights)
        xz = self.in_proj(x)
        logits = self.block_head(class_token(xz, slot)).squeeze(1)
        decisions = gate_decisions(logits) if self.training else logits
        u, z = xz.chunk(2, dim=-1)
        u, u_b = self.convolve(masked(u, mask))
        # The mask again: SiLU of the convolution's bias is not 0.
        f, g = self.direction(masked(u, mask), False), self.direction(masked(u_b, mask), True)
        # A scan and its skip are linear in u, so a gate on u is a gate on the direction's output.
        on = (decisions if self.training else decisions > 0).to(u.dtype).unsqueeze(1)
        f = Direction(f.u * on[..., :1], f.delta, f.bc, f.A, f.D, f.delta_bias, False)
        g = Direction(g.u * on[..., 1:], g.delta, g.bc, g.A, g.D, g.delta_bias, True)
        return self.out_proj(scan([f, g], z, None, 0.5)), decisions

    @torch.jit.ignore
    def _chosen(self, x: Tensor, weights: list[DirectionWeights]) -> tuple[Tensor, Tensor]:
        """The same, computing for each image only the directions that it chose."""
        # A single image is projected at once: it seldom leaves out both directions, and the weights are read once.
        xz, middle = self.in_proj(x) if len(x) == 1 else None, (x.shape[1] - 1) // 2
        logits = self.block_head(self.in_proj(x[:, middle]) if xz is None else xz[:, middle])
        chosen = [[value > 0 for value in row] for row in logits.tolist()]  # the one wait for the device
        if not any(map(any, chosen)):  # nothing to compute, or no image
            return torch.zeros_like(x), logits
        if chosen.count(chosen[0]) == len(chosen):  # all alike: nothing is sorted
            xz = self.in_proj(x) if xz is None else xz
            return self.out_proj(_mix(xz, weights, chosen[0])), logits
        # One group for each choice, not one for each direction: the scan of a pair shares the loads of z and its gate.
        groups = {kind: [i for i, choice in enumerate(chosen) if choice == list(kind)] for kind in _KINDS}
        index = torch.tensor(sum(groups.values(), []), device=x.device)
        parts = self.in_proj(x.index_select(0, index)).split([len(rows) for rows in groups.values()])
        mixed = [_mix(part, weights, kind) for part, kind in zip(parts, _KINDS, strict=True) if len(part)]
        y = self.out_proj(torch.cat(mixed))
        return y.new_zeros(x.shape).index_copy(0, index, y), logits


def _mix(xz: Tensor, weights: list[DirectionWeights], chosen: Sequence[bool]) -> Tensor:
    """Halved sum of the chosen directions, forward and backward, between the outer projections."""
    if all(chosen):
        return mix_tokens(xz, weights, [False, True], None, 0.5)
    return mix_tokens(xz, [weights[chosen[1]]], [chosen[1]], None, 0.5)


def _may_branch(x: Tensor) -> bool:
    """Whether Python may look at values: not while a program is recorded, in whatever way."""
    return is_eager(x) and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
