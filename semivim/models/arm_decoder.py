"""Autoregressive pretraining of a Vim (ARM): its causal pass in the order of clusters, and the decoder of pixels.

Ren et al. 2025, "Autoregressive Pretraining with Mamba in Vision" (ICLR). A cluster is a square of patches. All pixels
of cluster k are predicted at once from clusters 0 to k - 1, so the last cluster is never read and cluster 0 is never
predicted. A Vim's mixer scans in two directions; each causal pass here uses one of them in every block, as one block
that mixed both would show every token all others.

Dimensions: ``b`` images, ``g`` patches of an image, ``m`` patches of a cluster, ``n = g / m`` clusters,
``l = (n - 1) m`` tokens that are read and as many that are predicted, ``d`` channels of the backbone, ``e`` of the
decoder, ``P`` values of a patch.
"""

from copy import deepcopy
from typing import Any

import torch
from timm.layers import Mlp, build_sincos2d_pos_embed, trunc_normal_
from timm.models import checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from semivim.layers import BidirectionalMamba, insert_middle, remove_middle
from semivim.models.vim import Block, Vim

DIRECTIONS = ("forward", "both")
HEAD_DIM = 64


def cluster_order(grid: tuple[int, int], cluster: int) -> Tensor:
    """Raster positions of the patches in the order of clusters: clusters in raster order, and patches inside each.

    Args:
        grid: Rows and columns of patches.
        cluster: Side of a cluster, in patches.

    Returns:
        ``(g,)``, int64.

    Raises:
        ValueError: If clusters do not tile the grid, or there are fewer than two.
    """
    rows, columns = grid
    if cluster < 1 or rows % cluster or columns % cluster or rows * columns < 2 * cluster**2:
        raise ValueError(
            f"cluster is {cluster}, wanted a divisor of the grid {rows} x {columns} that makes two or more"
        )
    raster = torch.arange(rows * columns).view(rows // cluster, cluster, columns // cluster, cluster)
    return raster.transpose(1, 2).flatten()


def cluster_mask(clusters: int, size: int) -> Tensor:
    """Which features a query may see: those of its own block and of earlier ones.

    Block i of the queries stands for cluster i + 1, block i of the features for cluster i.

    Args:
        clusters: Blocks, n - 1.
        size: Tokens of a block, m.

    Returns:
        ``(l, l)``, bool, queries by features, True where they may see.
    """
    block = torch.arange(clusters).repeat_interleave(size)
    return block[:, None] >= block[None, :]


def sincos_position(grid: tuple[int, int], dim: int) -> Tensor:
    """MAE's fixed 2-D position embedding: half the channels for the column, half for the row, sines before cosines.

    Args:
        grid: Rows and columns of patches.
        dim: Channels, a multiple of 4.

    Returns:
        ``(g, dim)``.

    Raises:
        ValueError: If 4 does not divide ``dim``.
    """
    if dim % 4:
        raise ValueError(f"channels of a 2-D position embedding are {dim}, wanted a multiple of 4")
    by_function = build_sincos2d_pos_embed(list(grid), dim).view(-1, 2, 2, dim // 4)  # sine or cosine, row or column
    return by_function.flip(2).transpose(1, 2).flatten(1)


@torch.no_grad()
def set_fixed_position(backbone: Vim) -> None:
    """Give the patches the fixed 2-D position embedding and the class token none, as ARM starts."""
    patches = sincos_position(backbone.patch_embed.grid_size, backbone.embed_dim)[None]
    backbone.pos_embed.copy_(insert_middle(patches, torch.zeros(1, 1, backbone.embed_dim)))


def mixers(backbone: Vim) -> list[BidirectionalMamba]:
    """Return the mixer of every block."""
    return [module for module in backbone.modules() if isinstance(module, BidirectionalMamba)]


@torch.no_grad()
def copy_forward_direction(backbone: Vim) -> None:
    """Set the parameters of every backward direction to those of the forward one."""
    for mixer in mixers(backbone):
        for forward, backward in mixer.twins():
            backward.copy_(forward)


def tap_blocks(depth: int) -> list[int]:
    """Numbers of the blocks, from 1, whose outputs the decoder reads: after 1/2, 2/3, 5/6 and all of the depth."""
    return [max(1, round(depth * share)) for share in (1 / 2, 2 / 3, 5 / 6, 1)]


class CrossAttentionBlock(nn.Module):
    """``q + Attention(LN(q), LN(features))``, then ``q + MLP(LN(q))``; queries do not see each other."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_query, self.norm_feature, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.mlp = Mlp(dim, 4 * dim)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, query: Tensor, feature: Tensor, mask: Tensor) -> Tensor:
        """Update queries.

        Args:
            query: ``(b, queries, e)``.
            feature: ``(b, features, e)``.
            mask: ``(queries, features)``, True where a query may see a feature.
        """
        key, value = self.key_value(self.norm_feature(feature)).chunk(2, -1)
        wanted = self._heads(self.query(self.norm_query(query)))
        seen = F.scaled_dot_product_attention(wanted, self._heads(key), self._heads(value), mask)
        query = query + self.proj(seen.transpose(1, 2).flatten(2))
        return query + self.mlp(self.norm_mlp(query))


class ArmDecoder(nn.Module):
    """Predicts the patches of each cluster from the features of earlier ones, by cross-attention only.

    Every block of the decoder reads its own learned mix of the four levels of features.

    Args:
        feature_dim: d.
        patch_values: P.
        dim: e, a multiple of 64, or less than that.
        depth: Number of blocks.

    Raises:
        ValueError: If ``dim`` is none of these.

    Source: Ren et al. 2025 (ARM), and its released code for initialisation and norms.
    """

    def __init__(self, feature_dim: int, patch_values: int, dim: int = 512, depth: int = 4) -> None:
        super().__init__()
        num_heads = max(1, dim // HEAD_DIM)
        if dim > HEAD_DIM and dim % HEAD_DIM:
            raise ValueError(f"the decoder's channels are {dim}, wanted a multiple of {HEAD_DIM}, or fewer than that")
        self.dim, self.depth = dim, depth
        self.norms = nn.ModuleList(nn.LayerNorm(feature_dim) for _ in range(4))
        self.mix = nn.Linear(4 * feature_dim, depth * dim)
        self.token = nn.Parameter(torch.empty(1, 1, dim))
        self.blocks = nn.ModuleList(CrossAttentionBlock(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, patch_values)
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        trunc_normal_(self.token, std=0.02)
        for linear in self.blocks.modules():
            if isinstance(linear, nn.Linear):
                nn.init.xavier_uniform_(linear.weight)
        for linear in self.modules():
            if isinstance(linear, nn.Linear):
                nn.init.zeros_(linear.bias)

    def features(self, taps: list[Tensor]) -> list[Tensor]:
        """Mix the four levels of features, ``(b, l, d)`` each, to those of each block, ``(b, l, e)``."""
        levels = torch.cat([norm(x) for norm, x in zip(self.norms, taps, strict=True)], -1)
        return list(self.mix(levels).unflatten(-1, (self.dim, self.depth)).unbind(-1))

    def forward(self, taps: list[Tensor], position: Tensor, mask: Tensor) -> Tensor:
        """Predict patches.

        Args:
            taps: Four levels of features, ``(b, l, d)`` each.
            position: Position embedding of the patches to predict, ``(queries, e)``.
            mask: ``(queries, l)``, True where a query may see a feature.

        Returns:
            ``(b, queries, P)``.
        """
        query = (self.token + position).expand(len(taps[0]), -1, -1)
        for block, feature in zip(self.blocks, self.features(taps), strict=True):
            query = block(query, feature, mask)
        return self.head(self.norm(query))


class ArmModel(nn.Module):
    """A Vim and a decoder that predict each cluster of an image from the clusters before it.

    ``forward`` trains the forward direction of every block, on clusters in their order; :meth:`export` copies it into
    the backward direction. ``both`` gives the first half of a batch to that pass and the second half to a pass through
    the backward directions, with all tokens in reversed order; the decoder is shared. Nothing is computed for a
    direction that a pass does not use. What a pass cannot train is frozen: the class token, the position embedding, the
    final norm, and with ``forward`` the backward directions.

    Args:
        backbone: A Vim without a classifier, for images of a fixed size, of patches that do not overlap.
        cluster: Side of a cluster, in patches.
        directions: ``forward`` or ``both``.
        decoder_dim: Channels of the decoder.
        decoder_depth: Blocks of the decoder.

    Raises:
        ValueError: If the backbone is of another kind, or a size does not fit.

    Source: Ren et al. 2025 (ARM); Semi-ViM section 4.3. ``both`` is ours.
    """

    order: Tensor
    mask: Tensor
    position: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        cluster: int = 4,
        directions: str = "forward",
        decoder_dim: int = 512,
        decoder_depth: int = 4,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, Vim) or not all(isinstance(block, Block) for block in backbone.blocks):
            raise ValueError(f"backbone is a {type(backbone).__name__}, wanted a Vim, whose scan has one direction too")
        if directions not in DIRECTIONS:
            raise ValueError(f"directions is {directions!r}, wanted one of {', '.join(DIRECTIONS)}")
        conv = backbone.patch_embed.proj
        if conv.kernel_size != conv.stride or conv.kernel_size[0] != conv.kernel_size[1]:
            raise ValueError(
                f"patches of {conv.kernel_size} pixels stand {conv.stride} apart, wanted squares side by side"
            )
        self.backbone = backbone
        self.directions = directions
        self.patch_size: int = conv.kernel_size[0]
        self.grid: tuple[int, int] = backbone.patch_embed.grid_size
        self.cluster_size = cluster**2
        order = cluster_order(self.grid, cluster)
        self.num_clusters = len(order) // self.cluster_size
        values = backbone.in_chans * self.patch_size**2
        self.decoder = ArmDecoder(backbone.embed_dim, values, decoder_dim, decoder_depth)
        # Not saved: they follow from the sizes.
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("mask", cluster_mask(self.num_clusters - 1, self.cluster_size), persistent=False)
        self.register_buffer("position", sincos_position(self.grid, decoder_dim), persistent=False)
        self._freeze()

    def _freeze(self) -> None:
        self.backbone.requires_grad_(True)
        for part in (self.backbone.norm, self.backbone.head):
            part.requires_grad_(False)
        self.backbone.cls_token.requires_grad_(False)
        self.backbone.pos_embed.requires_grad_(False)
        if self.directions == "forward":
            for mixer in mixers(self.backbone):
                for _, backward in mixer.twins():
                    backward.requires_grad_(False)

    def passes(self) -> list[bool]:
        """Return the passes that train, each as whether it goes backward."""
        return [False] if self.directions == "forward" else [False, True]

    def _positions(self, backward: bool) -> Tensor:
        return self.order.flip(0) if backward else self.order

    def read_positions(self, backward: bool) -> Tensor:
        """Raster positions of the tokens that are read, ``(l,)``."""
        return self._positions(backward)[: -self.cluster_size]

    def predicted_positions(self, backward: bool) -> Tensor:
        """Raster positions of the patches that are predicted, ``(l,)``."""
        return self._positions(backward)[self.cluster_size :]

    def encode(self, images: Tensor, backward: bool) -> list[Tensor]:
        """Four levels of features of the clusters that are read: ``(b, c, h, w)`` to ``(b, l, d)`` each."""
        patches = self.backbone.patch_embed(images).flatten(2).transpose(1, 2)
        x = patches + remove_middle(self.backbone.pos_embed)[0]
        x = x[:, self.read_positions(backward)]
        outputs = []
        block: Any
        for block in self.backbone.blocks:
            if self.backbone.grad_checkpointing:
                x = checkpoint(block.one_direction, x, backward)
            else:
                x = block.one_direction(x, backward)
            outputs.append(x)
        return [outputs[number - 1] for number in tap_blocks(len(outputs))]

    def predict(self, images: Tensor, backward: bool) -> Tensor:
        """Predict normalised patches.

        Args:
            images: ``(b, c, h, w)``.
            backward: Whether to use the backward directions, on reversed tokens.

        Returns:
            ``(b, l, P)``, at :meth:`predicted_positions`.
        """
        position = self.position[self.predicted_positions(backward)]
        return self.decoder(self.encode(images, backward), position, self.mask)

    def forward(self, images: Tensor) -> Tensor:
        """Predict normalised patches, with ``both`` backward for the second half of the batch.

        Args:
            images: ``(b, c, h, w)``; with ``both`` two or more.

        Returns:
            ``(b, l, P)``, in the order of :meth:`targets`.

        Raises:
            ValueError: If there is one image for two directions.
        """
        if self.directions == "both" and len(images) < 2:
            raise ValueError(f"a batch has {len(images)} images, wanted two or more for both directions")
        parts = zip(images.tensor_split(len(self.passes())), self.passes(), strict=True)
        return torch.cat([self.predict(part, backward) for part, backward in parts])

    def targets(self, patches: Tensor) -> Tensor:
        """Choose and order patches, ``(b, g, P)`` in raster order, as :meth:`forward` predicts them: ``(b, l, P)``."""
        parts = zip(patches.tensor_split(len(self.passes())), self.passes(), strict=True)
        return torch.cat([part[:, self.predicted_positions(backward)] for part, backward in parts])

    def export(self) -> Vim:
        """Return a copy of the backbone to fine-tune: nothing frozen, a direction that did not train copied.

        A mixer halves the sum of its directions, so a copied direction keeps the scale of the pretrained output.
        """
        backbone = deepcopy(self.backbone).requires_grad_(True)
        if self.directions == "forward":
            copy_forward_direction(backbone)
        return backbone
