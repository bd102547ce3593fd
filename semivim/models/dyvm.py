"""Dynamic Vision Mamba (DyVM): a Vim that drops patches at three depths and directions of a block, image by image.

Wu et al. 2025, "Dynamic Vision Mamba" (arXiv:2504.04787), as its released ``DyVMTiny``, ``DyVMSmall`` and ``DyVMBase``.
Names of the new parameters (``block_head``, ``score_predictors``) are the released ones.

Differences from the release: `DyVM.forward_features` and `DyVM.forward_intermediates` put the patches back on the grid,
dropped ones with the values that they left with; the directions that an image did not choose are not computed, nor is
the mixer of an image that chose none.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath
from timm.models import build_model_with_cfg, checkpoint, register_model
from torch import Tensor, nn

from semivim._timm import update_model_args
from semivim.layers import DynamicMamba, RMSNorm, RoutedTokens, TokenRouter, kept_patches, restore_grid
from semivim.models.vim import Vim
from semivim.models.vim_weights import checkpoint_filter_fn, default_cfgs  # noqa: F401  timm reads it

__all__ = ["DyVM"]

torch.fx.wrap("kept_patches")
torch.fx.wrap("restore_grid")


class Routed(NamedTuple):
    """What a `DyVM` gives with ``return_decisions``, for losses and for study."""

    logits: Tensor  # (b, num_classes)
    tokens: Tensor  # (b, m + 1, d), what `forward_features` gives
    kept: Tensor  # (routers, b, m), 1 for the patches of the grid that a router kept
    gates: Tensor  # (depth, b, 2), 1 for the directions, forward and backward, that a block's images chose


class DynamicBlock(nn.Module):
    """``R_{i+1} = R_i + drop(Mixer(RMSNorm(R_i)))`` with a mixer that gates its directions."""

    def __init__(
        self,
        dim: int,
        drop_path: float = 0.0,
        ssmixup_c: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if ssmixup_c is not None:
            raise ValueError(f"ssmixup_c is {ssmixup_c!r}, wanted None: a DyVM mixes no hidden states")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = RMSNorm(dim, **dd)
        self.mixer = DynamicMamba(dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None, slot: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, decisions = self.mixer(self.norm(x), mask, slot)
        return x + self.drop_path(y), decisions


class DyVM(Vim):
    """Dynamic Vision Mamba.

    Args:
        pruning_loc: Blocks before which patches are dropped, rising.
        token_ratio: Share of the patches that each of these keeps, of what the one before it kept: after ``s`` of them
            ``int(token_ratio ** s * m)`` of the grid's ``m`` patches are left. In training it is what the loss aims at.
            `set_token_ratio` changes it.
        block_keep_ratio: Share of all directions that the training loss aims at; evaluation does not read it.
        **kwargs: Arguments of `Vim` but those of SSMixup.

    Raises:
        ValueError: If a ratio is not in (0, 1], ``pruning_loc`` does not rise within the depth, or ``ssmixup_c`` is
            given.
    """

    trained_by = "benchmarks/train_dyvm.py"  # other scripts leave out the losses of tokens and directions

    def __init__(
        self,
        pruning_loc: tuple[int, ...] = (6, 12, 18),
        token_ratio: float = 0.7,
        block_keep_ratio: float = 0.8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(block_fn=DynamicBlock, device=device, dtype=dtype, **kwargs)
        # A Sequential hands one value on; these blocks also take a mask, and give what decides on directions.
        self.blocks = nn.ModuleList(self.blocks)  # type: ignore[assignment]
        locations = list(pruning_loc)
        if locations != sorted(set(locations)) or not all(0 < i < len(self.blocks) for i in locations):
            raise ValueError(f"pruning_loc is {pruning_loc}, wanted rising numbers from 1 to {len(self.blocks) - 1}")
        if not 0 < block_keep_ratio <= 1:
            raise ValueError(f"block_keep_ratio is {block_keep_ratio}, wanted a share in (0, 1]")
        self.pruning_loc = locations
        self.block_keep_ratio = block_keep_ratio
        self.score_predictors = nn.ModuleList(
            [TokenRouter(self.embed_dim, 1.0, device=device, dtype=dtype) for _ in locations]
        )
        self._set_keep_ratios(token_ratio)

    @torch.jit.ignore
    def _set_keep_ratios(self, ratio: float) -> None:
        if not 0 < ratio <= 1:
            raise ValueError(f"token_ratio is {ratio}, wanted a share in (0, 1]")
        self.token_ratio = ratio
        for s, router in enumerate(self.score_predictors):
            assert isinstance(router, TokenRouter)
            router.keep_ratio = ratio ** (s + 1)

    @torch.jit.ignore
    def set_token_ratio(self, ratio: float) -> None:
        """Set the share of patches that each router keeps; no weight depends on it.

        Args:
            ratio: In (0, 1]; 1 keeps all patches and leaves the routers out of evaluation. Training still draws.
        """
        self._set_keep_ratios(ratio)
        update_model_args(self, token_ratio=ratio)

    @torch.jit.ignore
    @torch.no_grad()
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise all weights as DyVM does: those of a Vim, every gate on, every patch scored nearly alike."""
        super().init_weights(needs_reset)
        if needs_reset:
            for router in self.score_predictors:
                assert isinstance(router, TokenRouter)
                router.reset_parameters()

    @torch.jit.ignore
    def load_vim(self, state_dict: dict[str, Any], container: str = "model") -> list[str]:
        """Take over the weights of a plain `Vim`, as DyVM's training starts.

        Args:
            state_dict: See `checkpoint_filter_fn`.
            container: See `checkpoint_filter_fn`.

        Returns:
            The keys that a plain Vim lacks, whose weights stay: those of gates and routers.

        Raises:
            ValueError: If another key is missing, or a weight has another shape; this model is then as it was.
        """
        found, own = checkpoint_filter_fn(state_dict, self, container), self.state_dict()
        new = [k for k in own if ".block_head." in k or k.startswith("score_predictors.")]
        missing = [key for key in own if key not in found]
        if missing != new:
            other = sorted(set(missing) ^ set(new))
            raise ValueError(f"checkpoint has other keys than a plain Vim: {', '.join(other[:3])}")
        for name, weight in own.items():
            if name in found and found[name].shape != weight.shape:
                shape, wanted = tuple(found[name].shape), tuple(weight.shape)
                raise ValueError(f"{name} has shape {shape}, wanted {wanted}")
        self.load_state_dict(found, strict=False)
        return missing

    def _route(
        self, x: Tensor, take: list[int], last: int, decides: bool = False
    ) -> tuple[RoutedTokens, list[RoutedTokens], list[Tensor], list[Tensor]]:
        """Run the blocks up to ``last`` on embedded images.

        Returns:
            Tokens after the last block; tokens after each block of ``take``; if ``decides``, the patches that each
            router passed kept, ``(b, m)``; what decides on the directions of each block, ``(b, 2)``.
        """
        tokens = RoutedTokens(x)
        taken: list[RoutedTokens] = []
        kept: list[Tensor] = []
        decisions: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i <= last:
                for s, router in enumerate(self.score_predictors):
                    if i == self.pruning_loc[s]:
                        tokens = router(tokens)
                        if decides:
                            kept.append(kept_patches(tokens))
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x, decision = checkpoint(block, tokens.x, tokens.mask, tokens.slot)
                else:
                    x, decision = block(tokens.x, tokens.mask, tokens.slot)
                tokens = RoutedTokens(x, tokens.place, tokens.left, tokens.mask, tokens.slot)
                decisions.append(decision)
                if i in take:
                    taken.append(tokens)
        return tokens, taken, kept, decisions

    def _take(self, x: Tensor, take: list[int], last: int) -> tuple[Tensor, list[Tensor]]:
        tokens, taken, _, _ = self._route(x, take, last)
        return restore_grid(tokens), [restore_grid(y) for y in taken]

    def forward_features(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return all tokens of the grid after the final norm, ``(b, m + 1, d)``, the class token in the middle.

        A dropped patch is normed with the value that it left with.
        """
        return self.norm(restore_grid(self._route(self._embed(x), [], len(self.blocks) - 1)[0]))

    def forward(self, x: Tensor, return_decisions: bool = False) -> Tensor:  # type: ignore[override]
        """Classify images.

        Args:
            x: Images, ``(b, c, h, w)``.
            return_decisions: Also return what was kept and computed for each image.

        Returns:
            Logits, ``(b, num_classes)``, or with ``return_decisions`` a `Routed`, whose decisions have in training the
            gradient of their probabilities.
        """
        # Nested, as TorchScript compiles what stands behind an `and`.
        if not torch.jit.is_scripting():  # noqa: SIM102
            if return_decisions is True:  # torch.fx passes what stands for either value; its programs give logits
                return self._decide(x)  # type: ignore[return-value]
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def _decide(self, x: Tensor) -> Routed:
        routed, _, kept, decisions = self._route(self._embed(x), [], len(self.blocks) - 1, True)
        tokens = self.norm(restore_grid(routed))
        masks = torch.stack(kept) if kept else tokens.new_zeros(0, len(x), tokens.shape[1] - 1)
        on = torch.stack(decisions)
        if not self.training:  # logits
            on = (on > 0).to(on.dtype)
        return Routed(self.forward_head(tokens), tokens, masks, on)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.pruning_loc = [i for i in self.pruning_loc if i < len(self.blocks)]
        self.score_predictors = self.score_predictors[: len(self.pruning_loc)]
        return take


def _create_dyvm(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> DyVM:
    return build_model_with_cfg(
        DyVM,
        variant,
        pretrained,
        pretrained_filter_fn=partial(checkpoint_filter_fn, container="model"),
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**defaults, **kwargs},
    )


@register_model
def dyvm_tiny(pretrained: bool = False, **kwargs: Any) -> DyVM:
    """DyVM on Vim-Ti, 7.4 M parameters, 197 tokens of which 143 reach the last block."""
    return _create_dyvm("dyvm_tiny", pretrained, {"embed_dim": 192, "token_ratio": 0.9}, kwargs)


@register_model
def dyvm_small(pretrained: bool = False, **kwargs: Any) -> DyVM:
    """DyVM on Vim-S, 26.6 M parameters, 197 tokens of which 68 reach the last block."""
    return _create_dyvm("dyvm_small", pretrained, {"embed_dim": 384}, kwargs)


@register_model
def dyvm_base(pretrained: bool = False, **kwargs: Any) -> DyVM:
    """DyVM on Vim-B, 100.6 M parameters, 197 tokens of which 68 reach the last block."""
    return _create_dyvm("dyvm_base", pretrained, {"embed_dim": 768, "block_keep_ratio": 0.7}, kwargs)


@register_model
def test_dyvm(pretrained: bool = False, **kwargs: Any) -> DyVM:
    """For tests: 0.1 M parameters, 17 tokens of which 5 reach the last block."""
    defaults = {"patch_size": 8, "embed_dim": 32, "depth": 4, "pruning_loc": (1, 2, 3)}
    return _create_dyvm("test_dyvm", pretrained, defaults, kwargs)
