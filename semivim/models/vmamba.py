"""VMamba: a pyramid of four stages whose blocks scan the map in four directions.

Liu et al. 2024, "VMamba: Visual State Space Model" (arXiv:2401.10166), as its nine released models: the final family
``vmamba_<size>_s<ssm_ratio>l<depth of stage 3>`` (one state a channel, an MLP in each block) and the first,
``vanilla_vmamba_<size>`` (16 states, gated, no MLP). Maps are channel-last, ``(b, h, w, c)``, and of any size.

Parameter names inside a block are the released ones; outside they are timm's. Differences from the release: a stage
begins with its downsampling, so that its output is its feature; A_logs, Ds and dt_projs_bias are not decayed (the
release means so, but decays A_logs and dt_projs_bias: its marks on them are never read).
"""

from typing import Any

import torch
from timm.layers import (
    ClassifierHead,
    DropPath,
    Mlp,
    calculate_drop_path_rates,
    get_device_dtype,
    register_notrace_function,
    trunc_normal_,
)
from timm.models import build_model_with_cfg, checkpoint_seq, register_model
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn
from torch.nn import functional as F

from semivim._timm import feature_take_indices
from semivim.layers import SS2D
from semivim.models.vmamba_weights import checkpoint_filter_fn, default_cfgs, released_files  # noqa: F401  timm reads it

__all__ = ["VMamba"]


class PatchStem(nn.Module):
    """Image ``(b, c, h, w)`` to normalised patches of 4 x 4 pixels, ``(b, h // 4, w // 4, dim)``."""

    def __init__(self, in_chans: int, dim: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, dim, 4, stride=4, **dd)
        self.norm1 = nn.LayerNorm(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm1(self.conv1(x).permute(0, 2, 3, 1))


class ConvStem(nn.Module):
    """Image ``(b, c, h, w)`` to a map of a quarter of its sides, rounded up, by two convolutions of stride 2."""

    def __init__(self, in_chans: int, dim: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd)
        self.norm1 = nn.LayerNorm(dim // 2, eps=1e-5, **dd)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        # Channel-last memory, so that the convolution gives the same; by permutations, which vmap knows.
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        x = self.act(self.norm1(self.conv1(x).permute(0, 2, 3, 1)))
        return self.norm2(self.conv2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


@register_notrace_function
def widened(x: Tensor) -> Tensor:
    """Pad a map ``(b, h, w, c)`` of fewer than three columns with columns of zeros to three."""
    return F.pad(x, (0, 0, 0, 3 - x.shape[2])) if x.shape[2] < 3 else x


@register_notrace_function
def narrowed(y: Tensor, x: Tensor) -> Tensor:
    """Keep of the map of `widened` of x at half its size what that of x would be."""
    return y[:, :, :1] if x.shape[2] < 3 else y


torch.fx.wrap("widened")
torch.fx.wrap("narrowed")


class Downsample(nn.Module):
    """Halve the sides of a map, rounded up, by a convolution of stride 2."""

    def __init__(self, dim: int, out_dim: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(out_dim, eps=1e-5, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        # oneDNN's bfloat16 convolution (torch 2.14, AVX-512) reads beyond maps that are narrower than its kernel.
        y = self.conv(widened(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.norm(narrowed(y, x))


class Block(nn.Module):
    """``x + drop(SS2D(LN(x)))``, and then ``x + drop(MLP(LN(x)))`` where there is an MLP."""

    def __init__(
        self,
        dim: int,
        ssm_ratio: int,
        d_state: int,
        gated: bool,
        mlp_ratio: float,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.op = SS2D(dim, ssm_ratio, d_state, gated, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-5, **dd) if mlp_ratio > 0 else nn.Identity()
        self.mlp = Mlp(dim, int(mlp_ratio * dim), **dd) if mlp_ratio > 0 else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.op(self.norm(x)))
        if self.mlp is not None:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


class Stage(nn.Module):
    """A downsampling, except before the first stage, and blocks."""

    def __init__(self, downsample: nn.Module, blocks: list[Block]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class VMamba(nn.Module):
    """VMamba.

    Args:
        in_chans: Channels of the input.
        num_classes: Classes of the head; 0 for none.
        global_pool: timm's name of the pooling over the map, empty for none.
        depths: Blocks of each stage.
        embed_dim: Channels of the first stage; each further stage has twice as many.
        ssm_ratio: Channels of the scans per channel of the map.
        d_state: States per channel.
        mlp_ratio: Hidden channels of the MLP per channel of the map; 0 for blocks without one.
        vanilla: Whether the model is of the first family: gated scans, patches in place of overlapping convolutions.
        drop_rate: Dropout before the head's linear layer.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
    """

    def __init__(  # noqa: PLR0913
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: tuple[int, ...] = (2, 2, 8, 2),
        embed_dim: int = 96,
        ssm_ratio: int = 1,
        d_state: int = 1,
        mlp_ratio: float = 4.0,
        vanilla: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.output_fmt = "NHWC"
        dims = [embed_dim << i for i in range(len(depths))]
        self.num_features = dims[-1]
        self.stem = (PatchStem if vanilla else ConvStem)(in_chans, embed_dim, **dd)
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, (dim, of_stage) in enumerate(zip(dims, rates, strict=True)):
            downsample: nn.Module = nn.Identity()
            if i > 0:
                downsample = (PatchMerging if vanilla else Downsample)(dims[i - 1], dim, **dd)
            blocks = [Block(dim, ssm_ratio, d_state, vanilla, mlp_ratio, rate, **dd) for rate in of_stage]
            stages.append(Stage(downsample, blocks))
        self.stages = nn.Sequential(*stages)
        infos: list[dict[str, Any]] = [
            {"module": f"stages.{i}", "num_chs": dim, "reduction": 4 << i} for i, dim in enumerate(dims)
        ]
        self.feature_info = infos
        self.norm: nn.Module = nn.LayerNorm(self.num_features, eps=1e-5, **dd)
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, input_fmt="NHWC", **dd)
        self.head_hidden_size = self.head.num_features
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    @torch.no_grad()
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise all weights as VMamba does.

        Args:
            needs_reset: Whether the modules' own laws must be drawn again; not so in the constructor.
        """
        for module in self.modules():
            if needs_reset and isinstance(module, nn.LayerNorm | nn.Conv2d | SS2D):
                module.reset_parameters()
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"*.A_logs", "*.Ds", "*.dt_projs_bias"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^stages\.(\d+)"
        fine = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": blocks if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last stage's map after the final norm, ``(b, h, w, c)``."""
        return self.norm(self.stages(self.stem(x)))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the maps that chosen stages give.

        Args:
            x: Images, ``(b, c, h, w)``.
            indices: Stages to take; a number takes the last so many, None all.
            norm: Apply the final norm to the last stage's map.
            stop_early: Leave out the stages after the last index.
            output_fmt: ``NCHW`` or ``NHWC``.
            intermediates_only: Return only the list.

        Returns:
            What `forward_features` returns, and the maps.

        Raises:
            ValueError: If ``output_fmt`` is neither.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt is {output_fmt!r}, wanted 'NCHW' or 'NHWC'")
        take, last = feature_take_indices(len(self.stages), indices)
        final = len(self.stages) - 1
        x = self.stem(x)
        maps = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                y = self.norm(x) if norm and i == final else x
                maps.append(y.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else y)
        if intermediates_only:
            return maps
        # The final norm has the channels of the last stage.
        return (x if stop_early and last < final else self.norm(x)), maps

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the chosen intermediates do not need.

        Args:
            indices: Stages to keep the outputs of; a number keeps the last so many.
            prune_norm: Remove the final norm; it goes with the last stage, too.
            prune_head: Remove the classifier; it goes with the last stage, too.

        Returns:
            Indices of the stages kept as outputs.
        """
        take, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if shortened:
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images, ``(b, c, h, w)`` of any size, to logits, ``(b, num_classes)``."""
        return self.forward_head(self.forward_features(x))


def _create_vmamba(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> VMamba:
    with released_files():
        return build_model_with_cfg(
            VMamba,
            variant,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
            **{**defaults, **kwargs},
        )


_VANILLA = {"vanilla": True, "ssm_ratio": 2, "d_state": 16, "mlp_ratio": 0.0}


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T, s2l5, 30.7 M parameters."""
    return _create_vmamba("vmamba_tiny_s2l5", pretrained, {"depths": (2, 2, 5, 2), "ssm_ratio": 2}, kwargs)


@register_model
def vmamba_small_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S, s2l15, 50.1 M parameters."""
    return _create_vmamba("vmamba_small_s2l15", pretrained, {"depths": (2, 2, 15, 2), "ssm_ratio": 2}, kwargs)


@register_model
def vmamba_base_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B, s2l15, 88.6 M parameters."""
    defaults = {"depths": (2, 2, 15, 2), "embed_dim": 128, "ssm_ratio": 2}
    return _create_vmamba("vmamba_base_s2l15", pretrained, defaults, kwargs)


@register_model
def vmamba_tiny_s1l8(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T, s1l8, 30.2 M parameters."""
    return _create_vmamba("vmamba_tiny_s1l8", pretrained, {"depths": (2, 2, 8, 2)}, kwargs)


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S, s1l20, 49.0 M parameters."""
    return _create_vmamba("vmamba_small_s1l20", pretrained, {"depths": (2, 2, 20, 2)}, kwargs)


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B, s1l20, 86.6 M parameters."""
    return _create_vmamba("vmamba_base_s1l20", pretrained, {"depths": (2, 2, 20, 2), "embed_dim": 128}, kwargs)


@register_model
def vanilla_vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T of the first release, 22.9 M parameters."""
    return _create_vmamba("vanilla_vmamba_tiny", pretrained, {"depths": (2, 2, 9, 2), **_VANILLA}, kwargs)


@register_model
def vanilla_vmamba_small(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S of the first release, 44.4 M parameters."""
    return _create_vmamba("vanilla_vmamba_small", pretrained, {"depths": (2, 2, 27, 2), **_VANILLA}, kwargs)


@register_model
def vanilla_vmamba_base(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B of the first release, 76.3 M parameters."""
    defaults = {"depths": (2, 2, 27, 2), "embed_dim": 128, **_VANILLA}
    return _create_vmamba("vanilla_vmamba_base", pretrained, defaults, kwargs)


@register_model
def test_vmamba(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """For tests: 0.12 M parameters, maps of a twelfth of the usual channels."""
    return _create_vmamba("test_vmamba", pretrained, {"depths": (1, 1, 1, 1), "embed_dim": 8, "mlp_ratio": 1.0}, kwargs)
