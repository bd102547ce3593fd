import pytest
import torch
from timm.layers import resample_abs_pos_embed

from semivim.layers.token_order import insert_middle, remove_middle, resample_pos_embed
from tests.tolerance import assert_close


@pytest.mark.parametrize("num_patches", [1, 2, 9, 196])
def test_the_class_token_sits_in_slot_half_and_comes_out_again(num_patches):
    patches, token = torch.randn(2, num_patches, 3), torch.randn(2, 1, 3)
    tokens = insert_middle(patches, token)
    assert torch.equal(tokens[:, num_patches // 2], token[:, 0])
    back, taken = remove_middle(tokens)
    assert torch.equal(back, patches) and torch.equal(taken, token)


def test_resampling_to_the_same_grid_changes_nothing():
    pos_embed = torch.randn(1, 15, 4)
    assert resample_pos_embed(pos_embed, (2, 7), (2, 7)) is pos_embed


@pytest.mark.parametrize("new_grid", [(27, 27), (7, 14), (5, 3)])
def test_a_mark_on_the_class_slot_moves_to_the_new_middle_and_pollutes_nothing(new_grid):
    pos_embed = torch.zeros(1, 197, 4)
    pos_embed[:, 98] = 7.0
    resampled = resample_pos_embed(pos_embed, new_grid, (14, 14))
    num_patches = new_grid[0] * new_grid[1]
    assert resampled.shape == (1, num_patches + 1, 4)
    patches, token = remove_middle(resampled)
    assert torch.equal(token, torch.full((1, 1, 4), 7.0))
    assert not patches.any()


def test_the_grid_is_resampled_bicubically_row_by_row():
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(4.0), indexing="ij")
    pos_embed = torch.stack([rows, columns], -1).reshape(1, 24, 2)
    pos_embed = insert_middle(pos_embed, torch.zeros(1, 1, 2))
    resampled = remove_middle(resample_pos_embed(pos_embed, (12, 8), (6, 4)))[0].reshape(12, 8, 2)
    # Away from the border a linear ramp is resampled exactly.
    wanted = (torch.arange(12.0) + 0.5) / 2 - 0.5
    assert_close("rows", resampled[4:8, 3, 0], wanted[4:8])
    assert_close("columns", resampled[5, 4, 1], (torch.tensor(4.5) / 2 - 0.5))


def test_patches_of_another_grid_are_those_of_timm_and_the_class_row_is_untouched():
    pos_embed = torch.randn(1, 145, 8)
    resampled = resample_pos_embed(pos_embed, (14, 14), (12, 12))
    assert torch.equal(resampled[0, 98], pos_embed[0, 72])
    wanted = resample_abs_pos_embed(remove_middle(pos_embed)[0], [14, 14], [12, 12], num_prefix_tokens=0)
    assert_close("patches", remove_middle(resampled)[0], wanted)


def test_bfloat16_stays_bfloat16():
    assert resample_pos_embed(torch.randn(1, 5, 4).bfloat16(), (3, 3), (2, 2)).dtype == torch.bfloat16


def test_a_wrong_number_of_slots_is_named():
    with pytest.raises(ValueError, match="197 slots, wanted 170"):
        resample_pos_embed(torch.zeros(1, 197, 4), (14, 14), (13, 13))
