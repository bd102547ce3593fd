"""Patch embedding with a stride smaller than the patch (timm's `PatchEmbed` has stride = patch size only)."""

from typing import Any

import torch
from timm.layers import PatchEmbed


class OverlapPatchEmbed(PatchEmbed):
    """Overlapping patches: ``(h - patch_size) // stride + 1`` rows, no padding, the rest as timm's `PatchEmbed`.

    Args:
        stride: Distance between neighbouring patches, in pixels.
        patch_size: Side of a patch, in pixels.
        kwargs: As timm's `PatchEmbed`.
    Source: Vim's stride-8 models (patch 16, stride 8: 27 x 27 patches of 224 x 224 pixels).
    """

    def __init__(self, *, stride: int, patch_size: int, **kwargs: Any) -> None:
        # PatchEmbed.__init__ computes the grid, for which it needs the stride.
        self.stride = stride
        super().__init__(patch_size=patch_size, **kwargs)
        self.proj.stride = (stride, stride)

    def _init_img_size(self, img_size: int | tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int], int]:
        size, _, _ = super()._init_img_size(img_size)
        rows, columns = self.dynamic_feat_size(size)
        return size, (rows, columns), rows * columns

    @torch.jit.ignore
    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        if patch_size is not None:
            raise ValueError(f"patch_size of overlapping patches is fixed, got {patch_size}, wanted None")
        super().set_input_size(img_size)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        return self.stride if as_scalar else (self.stride, self.stride)

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        rows = (img_size[0] - self.patch_size[0]) // self.stride + 1
        columns = (img_size[1] - self.patch_size[1]) // self.stride + 1
        return rows, columns
