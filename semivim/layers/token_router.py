"""Which tokens a dynamic Vision Mamba keeps: their scores, the choice, and the order of what goes on.

Dimensions: ``b`` images, ``m`` patches of the grid, ``p`` patches that are scored, ``k`` patches that stay, ``l``
tokens with the class token among them, ``d`` channels.

A trained model keeps the best ``k`` patches of every image, in their order, with the class token in their middle. While
it trains, the number differs by image: dropped patches move behind the kept ones, where a mask takes them out of the
mixers, so that the tensors stay rectangular and the kept tokens are computed as if the others were gone.

Source: Wu et al. 2025, "Dynamic Vision Mamba" (arXiv:2504.04787), and its released code.
"""

from typing import Any, NamedTuple

import torch
from timm.layers import register_notrace_function, trunc_normal_
from torch import Tensor, nn

from semivim.layers.token_order import insert_middle, remove_middle


class RoutedTokens(NamedTuple):
    """Tokens on their way through the blocks, and what is needed to put them back on the grid."""

    x: Tensor  # (b, l, d)
    place: Tensor | None = None  # (b, l - 1), place on the grid of each patch of x; None for all in their order
    left: Tensor | None = None  # (b, m, d), all patches as they were when the last router chose; None in training
    mask: Tensor | None = None  # (b, l, 1), 1 for tokens that the mixers read; None for all
    slot: Tensor | None = None  # (b, 1), slot of the class token; None for the middle


def gumbel_like(x: Tensor) -> Tensor:
    """Gumbel noise of the shape of a tensor."""
    return -torch.empty_like(x).exponential_().log()


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """Return the value of ``hard`` with the gradient of ``soft``."""
    return hard - soft.detach() + soft


def _rows(index: Tensor, l: int) -> Tensor:
    """Rows of tokens of a batch one behind the other: ``(b, k)`` among the ``l`` tokens of each image to ``(b k,)``."""
    first = torch.arange(index.shape[0], device=index.device).unsqueeze(1) * l
    return (index + first).flatten()


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Take tokens by index, an index per image: ``(b, l, d)`` and ``(b, k)`` to ``(b, k, d)``."""
    # Whole rows: torch's own gather takes value by value, four times as long.
    rows = x.flatten(0, 1).index_select(0, _rows(index, x.shape[1]))
    return rows.unflatten(0, [index.shape[0], index.shape[1]])


def scatter_tokens(grid: Tensor, place: Tensor, x: Tensor) -> Tensor:
    """Return ``grid`` ``(b, m, d)`` with the tokens ``(b, k, d)`` in the places ``(b, k)``."""
    rows = grid.flatten(0, 1).index_copy(0, _rows(place, grid.shape[1]), x.flatten(0, 1))
    return rows.unflatten(0, [grid.shape[0], grid.shape[1]])


@register_notrace_function
def class_token(x: Tensor, slot: Tensor | None) -> Tensor:
    """Class token ``(b, 1, d)`` of tokens ``(b, l, d)``, from a slot per image ``(b, 1)`` or the middle."""
    if slot is None:
        middle = (x.shape[1] - 1) // 2
        return x[:, middle : middle + 1]
    return gather_tokens(x, slot)


def _patch_slots(l: int, slot: Tensor) -> Tensor:
    """Slots of the patches among ``l`` tokens, ``(b, l - 1)``."""
    seat = torch.arange(l - 1, device=slot.device).unsqueeze(0)
    return seat + (seat >= slot).to(seat.dtype)


@register_notrace_function
def patch_tokens(tokens: RoutedTokens) -> Tensor:
    """Patches ``(b, l - 1, d)`` without the class token, in the order of ``tokens.x``."""
    slot = tokens.slot
    if slot is None:
        return remove_middle(tokens.x)[0]
    return gather_tokens(tokens.x, _patch_slots(tokens.x.shape[1], slot))


@register_notrace_function
def policy_of(tokens: RoutedTokens) -> Tensor | None:
    """The mask of the patches, ``(b, l - 1, 1)``, in the order of ``tokens.x``; None where all are kept."""
    mask, slot = tokens.mask, tokens.slot
    if mask is None or slot is None:
        return None
    return gather_tokens(mask, _patch_slots(tokens.x.shape[1], slot))


@register_notrace_function
def restore_grid(tokens: RoutedTokens) -> Tensor:
    """Put the patches back on the grid, ``(b, m + 1, d)`` with the class token in the middle.

    A dropped patch has the value with which it left: no later block changes it.
    """
    place, left = tokens.place, tokens.left
    if place is None:
        return tokens.x
    patches = patch_tokens(tokens)
    grid = torch.zeros_like(patches) if left is None else left
    return insert_middle(scatter_tokens(grid, place, patches), class_token(tokens.x, tokens.slot))


@register_notrace_function
def kept_patches(tokens: RoutedTokens) -> Tensor:
    """1 for each patch of the grid that is kept and 0 for each that was dropped, ``(b, m)``.

    In training with the gradient of the probability to be kept.
    """
    place, left = tokens.place, tokens.left
    patches, policy = patch_tokens(tokens), policy_of(tokens)
    kept = torch.ones_like(patches[..., 0]) if policy is None else policy[..., 0]
    if place is None:
        return kept
    m = kept.shape[1] if left is None else left.shape[1]
    return kept.new_zeros([kept.shape[0], m]).scatter(1, place, kept)


@register_notrace_function
def keep_best(tokens: RoutedTokens, log_probs: Tensor, keep_ratio: float) -> RoutedTokens:
    """Keep the patches of every image that score best, ``int(keep_ratio * m)`` of them, in their order.

    Args:
        tokens: All that the choice is made of.
        log_probs: Logarithm of the probabilities to be kept and to be dropped, ``(b, p, 2)``.
        keep_ratio: Share of the whole grid's patches that stay.
    """
    patches, place, left = patch_tokens(tokens), tokens.place, tokens.left
    left = patches if left is None or place is None else scatter_tokens(left, place, patches)
    index = log_probs[..., 0].topk(int(keep_ratio * left.shape[1]), dim=1, sorted=False)[1].sort(dim=1)[0]
    place = index if place is None else place.gather(1, index)
    x = insert_middle(gather_tokens(patches, index), class_token(tokens.x, None))
    return RoutedTokens(x, place, left, None, None)


@register_notrace_function
def keep_drawn(tokens: RoutedTokens, log_probs: Tensor) -> RoutedTokens:
    """Draw for every patch whether it is kept (straight-through Gumbel-softmax) and move dropped ones to the end.

    A patch once dropped stays so. The class token goes to the middle of the kept patches, whose number each image has
    of its own.

    Args:
        tokens: All that the choice is made of.
        log_probs: Logarithm of the probabilities to be kept and to be dropped, ``(b, p, 2)``.
    """
    patches, policy, place = patch_tokens(tokens), policy_of(tokens), tokens.place
    log_probs = log_probs.float()
    soft = (log_probs + gumbel_like(log_probs)).softmax(-1)
    kept = straight_through((soft[..., :1] >= soft[..., 1:]).to(soft.dtype), soft[..., :1])
    if policy is not None:
        kept = kept * policy
    dropped = (kept[..., 0] < 0.5).int()
    order = dropped.argsort(dim=1, stable=True)
    p = patches.shape[1]
    slot = (p - dropped.sum(1, keepdim=True)) // 2
    # The class token, last in `cat`, goes to its slot; patches after it move one on.
    seat = torch.arange(p + 1, device=slot.device).unsqueeze(0)
    behind = order.gather(1, (seat - (seat > slot).to(seat.dtype)).clamp(max=p - 1))
    source = torch.where(seat == slot, p, behind)
    x = gather_tokens(torch.cat([patches, class_token(tokens.x, tokens.slot)], 1), source)
    mask = gather_tokens(torch.cat([kept, torch.ones_like(kept[:, :1])], 1), source)
    place = order if place is None else place.gather(1, order)
    return RoutedTokens(x, place, None, mask, slot)


@register_notrace_function
def kept_mean(x: Tensor, policy: Tensor | None) -> Tensor:
    """Sum of the kept patches ``(b, p, d)`` over their number and 1, ``(b, 1, d)``.

    The released code adds 1 to the number; its weights were trained with it.
    """
    if policy is None:
        return x.sum(1, keepdim=True) / (x.shape[1] + 1)
    return ((policy * x).sum(1, keepdim=True) / (policy.sum(1, keepdim=True) + 1)).to(x.dtype)


# torch.fx cannot follow what asks for None or for a size: each is one node to it, as it is to timm's tracer.
for name in ("patch_tokens", "policy_of", "keep_best", "keep_drawn", "kept_mean"):
    torch.fx.wrap(name)


class TokenRouter(nn.Module):
    """Score every patch by itself and by the mean of the kept ones, then drop the worst.

    Args:
        dim: Channels of a token.
        keep_ratio: Share of the grid's patches that stay after this router.
    """

    def __init__(
        self,
        dim: int,
        keep_ratio: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.keep_ratio = keep_ratio
        self.in_conv = nn.Sequential(nn.LayerNorm(dim, **dd), nn.Linear(dim, dim, **dd), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2, **dd),
            nn.GELU(),
            nn.Linear(dim // 2, dim // 4, **dd),
            nn.GELU(),
            nn.Linear(dim // 4, 2, **dd),
            nn.LogSoftmax(dim=-1),
        )
        self.reset_parameters()

    @torch.jit.ignore
    @torch.no_grad()
    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def score(self, patches: Tensor, policy: Tensor | None) -> Tensor:
        """Logarithm of the probabilities to be kept and to be dropped, ``(b, p, 2)``.

        Args:
            patches: ``(b, p, d)``.
            policy: 1 for patches that are still kept, 0 for others, ``(b, p, 1)``; None for ones.
        """
        own, shared = self.in_conv(patches).chunk(2, dim=-1)
        return self.out_conv(torch.cat([own, kept_mean(shared, policy).expand_as(own)], dim=-1))

    def forward(self, tokens: RoutedTokens) -> RoutedTokens:
        """Drop patches: of each image those that it draws in training, the worst otherwise."""
        if self.training:
            return keep_drawn(tokens, self.score(patch_tokens(tokens), policy_of(tokens)))
        if self.keep_ratio == 1.0:
            return tokens
        return keep_best(tokens, self.score(patch_tokens(tokens), None), self.keep_ratio)
