import pytest
import torch
from torch.nn import functional as F

from semivim.layers.patch_embed import OverlapPatchEmbed
from tests.tolerance import assert_close


@pytest.fixture
def embed():
    return OverlapPatchEmbed(stride=8, patch_size=16, img_size=(224, 64), embed_dim=4, flatten=False)


def test_the_grid_counts_overlapping_patches(embed):
    assert embed.grid_size == (27, 7) and embed.num_patches == 189
    assert embed.feat_ratio() == 8 and embed.feat_ratio(as_scalar=False) == (8, 8)


def test_forward_is_a_convolution_with_that_stride(embed):
    x = torch.randn(2, 3, 224, 64)
    y = embed(x)
    assert y.shape[2:] == embed.grid_size
    assert_close("patches", y, F.conv2d(x, embed.proj.weight, embed.proj.bias, stride=8))


def test_set_input_size_recounts(embed):
    embed.set_input_size((64, 32))
    assert embed.grid_size == (7, 3) and embed.num_patches == 21


def test_the_patch_size_is_fixed(embed):
    with pytest.raises(ValueError, match="patch_size"):
        embed.set_input_size(patch_size=8)
