"""Vision Mamba (Vim): a class token in the middle of the patches, bidirectional Mamba blocks, no MLP.

Zhu et al. 2024, "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model"
(arXiv:2401.09417), as its released ``bimambav2_..._midclstok_div2`` models. Parameter names inside a mixer are the
released ones; outside they are timm's (``blocks.i``, ``norm``).

Differences from the release: a token model in timm's sense (`forward_features` returns all tokens); ``drop_rate``
acts before the head, not after the position embedding; A_log, A_b_log, D and D_b are not decayed (the release means so,
but its mark on them is never read); the position embedding is resampled around the middle class token. ``semivim_*``
are the same backbone with SSMixup's read-out of the hidden states (Semi-ViM Eq. 14-16).
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import (
    DropPath,
    PatchEmbed,
    calculate_drop_path_rates,
    get_device_dtype,
    lecun_normal_,
    trunc_normal_,
)
from timm.models import build_model_with_cfg, checkpoint, register_model
from torch import Tensor, nn

from semivim._timm import feature_take_indices, update_model_input_size
from semivim.layers import (
    BidirectionalMamba,
    OverlapPatchEmbed,
    RMSNorm,
    insert_middle,
    remove_middle,
    resample_pos_embed,
)
from semivim.models.vim_weights import (
    WEIGHTS_ENTRY,
    checkpoint_filter_fn,
    default_cfgs,  # noqa: F401  timm reads it
    fit_pos_embed,
)

__all__ = ["Vim"]


class Block(nn.Module):
    """``R_{i+1} = R_i + drop(Mixer(RMSNorm(R_i)))``; the residual R stays float32 under autocast."""

    def __init__(
        self,
        dim: int,
        drop_path: float = 0.0,
        ssmixup_c: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.mixes = ssmixup_c is not None
        self.norm = RMSNorm(dim, **dd)
        self.mixer = BidirectionalMamba(dim, ssmixup_c=ssmixup_c or "own", **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, psi: Tensor | None = None, nu: Tensor | None = None) -> Tensor:
        y = self.mixer(self.norm(x), psi if self.mixes else None, nu if self.mixes else None)
        return x + self.drop_path(y)

    @torch.jit.ignore
    def one_direction(self, x: Tensor, backward: bool) -> Tensor:
        """The same with one direction's parameters, causal (see `BidirectionalMamba.one_direction`)."""
        return x + self.drop_path(self.mixer.one_direction(self.norm(x), backward))


class Vim(nn.Module):
    """Vision Mamba.

    Args:
        img_size: Height and width of the input, in pixels.
        patch_size: Side of a patch, in pixels.
        patch_stride: Distance between patches, in pixels; None for ``patch_size``.
        in_chans: Channels of the input.
        num_classes: Classes of the head; 0 for none.
        global_pool: ``token`` (class token), ``avg`` (mean of the patches) or empty for all tokens.
        embed_dim: Channels of a token.
        depth: Number of blocks.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
        dynamic_img_size: Take any input size; the position embedding is resampled on the fly.
        ssmixup_c: The C that reads the mixed hidden states (see `BidirectionalMamba`); None for a plain Vim, which
            refuses ``psi`` and ``nu``.
        ssmixup_layers: Number of last blocks that mix hidden states; None for all.
        block_fn: Class of the blocks.

    Raises:
        ValueError: If an argument contradicts another, or ``psi`` is given to a plain Vim.
    """

    def __init__(  # noqa: PLR0913
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        patch_stride: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 24,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
        ssmixup_c: str | None = None,
        ssmixup_layers: int | None = None,
        block_fn: type[nn.Module] = Block,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        first_mixing = _first_mixing(depth, ssmixup_c, ssmixup_layers)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False
        self.mixes = first_mixing < depth
        self._set_global_pool(global_pool)

        embed_args: dict[str, Any] = {
            "img_size": img_size,
            "patch_size": patch_size,
            "in_chans": in_chans,
            "embed_dim": embed_dim,
            "flatten": False,
            "strict_img_size": not dynamic_img_size,
            **dd,
        }
        if patch_stride is None:
            self.patch_embed = PatchEmbed(**embed_args)
        else:
            self.patch_embed = OverlapPatchEmbed(stride=patch_stride, **embed_args)
        slots = self.patch_embed.num_patches + self.num_prefix_tokens
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, slots, embed_dim, **dd))
        self.blocks = nn.Sequential(
            *[
                block_fn(embed_dim, rate, ssmixup_c if i >= first_mixing else None, **dd)  # type: ignore[arg-type]
                for i, rate in enumerate(calculate_drop_path_rates(drop_path_rate, depth))
            ]
        )
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(depth)
        ]
        self.norm: nn.Module = RMSNorm(embed_dim, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    @torch.no_grad()
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise all weights as Vim does.

        Args:
            needs_reset: Whether the modules' own laws must be drawn again; not so in the constructor.
        """
        for module in self.modules():
            if needs_reset and isinstance(module, RMSNorm | BidirectionalMamba):
                module.reset_parameters()
            if isinstance(module, BidirectionalMamba):
                module.out_proj.weight.div_(math.sqrt(len(self.blocks)))
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)  # type: ignore[arg-type]
        trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @torch.jit.ignore
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights as torch does, but also those of pretraining, which has no classifier and another image size.

        A position embedding of another grid is resampled around the class token. Where ``state_dict`` holds no weight
        of the classifier, this one keeps its own; they are still listed as missing.
        """
        pos_embed = state_dict.get("pos_embed")
        if isinstance(pos_embed, Tensor) and pos_embed.shape != self.pos_embed.shape:
            state_dict = {**state_dict, "pos_embed": fit_pos_embed(pos_embed, self)}
        headless = not any(name.startswith("head.") for name in state_dict)
        result = super().load_state_dict(state_dict, strict=strict and not headless, assign=assign)
        unfit = [*(name for name in result.missing_keys if not name.startswith("head.")), *result.unexpected_keys]
        if strict and unfit:
            raise RuntimeError(f"weights do not fit {type(self).__name__} by {len(unfit)} names, such as {unfit[0]}")
        return result

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token", "*.A_log", "*.A_b_log", "*.D", "*.D_b"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:  # noqa: ARG002  timm's signature
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    @torch.jit.ignore
    def _set_global_pool(self, global_pool: str) -> None:
        if global_pool not in ("", "avg", "token"):
            raise ValueError(f"global_pool is {global_pool!r}, wanted 'token', 'avg' or ''")
        self.global_pool = global_pool

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        dd = get_device_dtype(self)
        self.num_classes = num_classes
        if global_pool is not None:
            self._set_global_pool(global_pool)
        self.head = nn.Linear(self.embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    @torch.jit.ignore
    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Change the nominal input size in place, resampling the position embedding around the class token.

        Args:
            img_size: Height and width, in pixels; None to keep.
            patch_size: Side of a patch, in pixels; None to keep.
        """
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        pos_embed = resample_pos_embed(self.pos_embed, self.patch_embed.grid_size, old_grid)
        if pos_embed is not self.pos_embed:
            self.pos_embed = nn.Parameter(pos_embed.detach(), requires_grad=self.pos_embed.requires_grad)
        update_model_input_size(self, self.patch_embed.img_size, patch_size=patch_size)

    def _embed(self, x: Tensor) -> Tensor:
        """Image ``(b, c, h, w)`` to tokens ``(b, l, d)``."""
        x = self.patch_embed(x)
        pos_embed = self.pos_embed
        if self.dynamic_img_size:
            grid = (x.shape[2], x.shape[3])
            pos_embed = resample_pos_embed(pos_embed, grid, self.patch_embed.grid_size)
        x = x.flatten(2).transpose(1, 2)
        x = insert_middle(x, self.cls_token.expand(x.shape[0], -1, -1))
        return x + pos_embed

    def _check_mix(self, psi: Tensor | None, nu: Tensor | None) -> None:
        # isinstance, not `is None`: while torch.fx traces, both are proxies.
        if not self.mixes and (isinstance(psi, Tensor) or isinstance(nu, Tensor)):
            raise ValueError("psi and nu are tensors, wanted None: this model was built without ssmixup_c")

    def forward_features(self, x: Tensor, psi: Tensor | None = None, nu: Tensor | None = None) -> Tensor:
        """Return all tokens after the final norm, ``(b, l, d)``; the class token stays in the middle."""
        self._check_mix(psi, nu)
        x = self._embed(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, psi, nu)
            else:
                x = block(x, psi, nu)
        return self.norm(x)

    def _take(self, x: Tensor, take: list[int], last: int) -> tuple[Tensor, list[Tensor]]:
        """Tokens after the block ``last`` and after each block of ``take``, ``(b, l, d)``."""
        taken = []
        for i, block in enumerate(self.blocks[: last + 1]):
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
            if i in take:
                taken.append(x)
        return x, taken

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return what chosen blocks give, the class token taken out of the middle.

        Args:
            x: Images, ``(b, c, h, w)``.
            indices: Blocks to take; a number takes the last so many, None all.
            return_prefix_tokens: Pair each intermediate with its class token, ``(b, 1, d)``.
            norm: Apply the final norm to the intermediates.
            stop_early: Leave out the blocks after the last index.
            output_fmt: ``NCHW`` for ``(b, d, rows, columns)`` or ``NLC`` for ``(b, rows * columns, d)``.
            intermediates_only: Return only the list.

        Returns:
            What `forward_features` returns, and the intermediates.

        Raises:
            ValueError: If ``output_fmt`` is neither.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}, wanted 'NCHW' or 'NLC'")
        take, last = feature_take_indices(len(self.blocks), indices)
        rows, columns = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        x, taken = self._take(self._embed(x), take, last if stop_early else len(self.blocks) - 1)
        split = [remove_middle(self.norm(y) if norm else y) for y in taken]
        maps: list[Any] = [patches for patches, _ in split]
        if output_fmt == "NCHW":
            maps = [y.transpose(1, 2).reshape(y.shape[0], -1, rows, columns).contiguous() for y in maps]
        if return_prefix_tokens:
            maps = list(zip(maps, (token for _, token in split), strict=True))
        return maps if intermediates_only else (self.norm(x), maps)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the chosen intermediates do not need.

        Args:
            indices: Blocks to keep the outputs of; a number keeps the last so many.
            prune_norm: Remove the final norm.
            prune_head: Remove the classifier.

        Returns:
            Indices of the blocks kept as outputs.
        """
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def pool(self, x: Tensor) -> Tensor:
        """Tokens ``(b, l, d)`` to features ``(b, d)``, or the tokens themselves with an empty ``global_pool``."""
        if self.global_pool == "token":
            return x[:, (x.shape[1] - 1) // 2]
        if self.global_pool == "avg":
            return remove_middle(x)[0].mean(dim=1)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor, psi: Tensor | None = None, nu: Tensor | None = None) -> Tensor:
        """Classify images.

        Args:
            x: Images, ``(b, c, h, w)``.
            psi: SSMixup's share of the forward states, ``(b,)`` in [0, 1]; None for a plain forward pass.
            nu: SSMixup's strength, ``(b,)``, 0 for rows that are not mixed; None together with ``psi``.

        Returns:
            Logits, ``(b, num_classes)``.
        """
        return self.forward_head(self.forward_features(x, psi, nu))


def _first_mixing(depth: int, ssmixup_c: str | None, ssmixup_layers: int | None) -> int:
    """Index of the first block that mixes hidden states; ``depth`` where none does."""
    if ssmixup_c is None:
        if ssmixup_layers is not None:
            raise ValueError(f"ssmixup_layers is {ssmixup_layers}, wanted None without ssmixup_c")
        return depth
    layers = depth if ssmixup_layers is None else ssmixup_layers
    if not 1 <= layers <= depth:
        raise ValueError(f"ssmixup_layers is {ssmixup_layers}, wanted 1 to {depth} (depth)")
    return depth - layers


def _create_vim(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> Vim:
    return build_model_with_cfg(
        Vim,
        variant,
        pretrained,
        pretrained_filter_fn=partial(checkpoint_filter_fn, container=WEIGHTS_ENTRY.get(variant, "model")),
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**defaults, **kwargs},
    )


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti, 7.1 M parameters, 197 tokens."""
    return _create_vim("vim_tiny_patch16_224", pretrained, {"embed_dim": 192}, kwargs)


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S, 25.8 M parameters, 197 tokens."""
    return _create_vim("vim_small_patch16_224", pretrained, {"embed_dim": 384}, kwargs)


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-B, 97.6 M parameters, 197 tokens."""
    return _create_vim("vim_base_patch16_224", pretrained, {"embed_dim": 768}, kwargs)


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti+ (stride 8), 7.3 M parameters, 730 tokens."""
    return _create_vim("vim_tiny_patch16_stride8_224", pretrained, {"embed_dim": 192, "patch_stride": 8}, kwargs)


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S+ (stride 8), 26.0 M parameters, 730 tokens."""
    return _create_vim("vim_small_patch16_stride8_224", pretrained, {"embed_dim": 384, "patch_stride": 8}, kwargs)


@register_model
def semivim_tiny(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti with SSMixup's read-out."""
    return _create_vim("semivim_tiny", pretrained, {"embed_dim": 192, "ssmixup_c": "own"}, kwargs)


@register_model
def semivim_small(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S with SSMixup's read-out."""
    return _create_vim("semivim_small", pretrained, {"embed_dim": 384, "ssmixup_c": "own"}, kwargs)


@register_model
def semivim_base(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-B with SSMixup's read-out."""
    return _create_vim("semivim_base", pretrained, {"embed_dim": 768, "ssmixup_c": "own"}, kwargs)


@register_model
def semivim_pico(pretrained: bool = False, **kwargs: Any) -> Vim:
    """For 32 x 32 images: 1 M parameters, 65 tokens; ours, not of the paper."""
    defaults = {"patch_size": 4, "embed_dim": 128, "depth": 6, "ssmixup_c": "own"}
    return _create_vim("semivim_pico", pretrained, defaults, kwargs)


@register_model
def test_vim(pretrained: bool = False, **kwargs: Any) -> Vim:
    """For tests: 0.09 M parameters, 17 tokens."""
    defaults = {"patch_size": 8, "embed_dim": 32, "depth": 4, "ssmixup_c": "own"}
    return _create_vim("test_vim", pretrained, defaults, kwargs)
