"""Where the class token sits: Vim puts it in the middle of the patch sequence, position embedding included.

A sequence of ``m`` patches carries its class token in slot ``m // 2``; the ``m + 1`` tokens together are ``l``.
"""

import torch
from timm.layers import register_notrace_function
from torch import Tensor
from torch.nn import functional as F


def insert_middle(patches: Tensor, token: Tensor) -> Tensor:
    """Insert a token in slot ``m // 2`` of a patch sequence.

    Args:
        patches: Patch tokens, ``(b, m, d)``.
        token: Class token, ``(b, 1, d)``.

    Returns:
        ``(b, m + 1, d)``.
    """
    middle = patches.shape[1] // 2
    return torch.cat([patches[:, :middle], token, patches[:, middle:]], dim=1)


def remove_middle(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Take the middle token out again, the inverse of `insert_middle`.

    Args:
        tokens: Patch tokens with the class token, ``(b, m + 1, d)``.

    Returns:
        The patches, ``(b, m, d)``, and the token, ``(b, 1, d)``.
    """
    middle = (tokens.shape[1] - 1) // 2
    return torch.cat([tokens[:, :middle], tokens[:, middle + 1 :]], dim=1), tokens[:, middle : middle + 1]


@register_notrace_function
def resample_pos_embed(pos_embed: Tensor, new_grid: tuple[int, int], old_grid: tuple[int, int]) -> Tensor:
    """Resample a position embedding to another patch grid, bicubic, around its middle class slot.

    timm's `resample_abs_pos_embed` takes the first slot for the class token; on a Vim that smears the class token's
    position over the grid and gives the class token a patch's position.

    Args:
        pos_embed: ``(1, m + 1, d)`` with ``m = old_grid[0] * old_grid[1]``.
        new_grid: Rows and columns of patches wanted.
        old_grid: Rows and columns of patches of ``pos_embed``.

    Returns:
        ``(1, new_grid[0] * new_grid[1] + 1, d)``, in the dtype of ``pos_embed``; ``pos_embed`` itself where the grids
        agree.

    Raises:
        ValueError: If ``pos_embed`` does not have the number of slots that ``old_grid`` implies.
    """
    slots = old_grid[0] * old_grid[1] + 1
    if pos_embed.shape[1] != slots:
        raise ValueError(f"pos_embed has {pos_embed.shape[1]} slots, wanted {slots} for a grid of {old_grid}")
    if new_grid[0] == old_grid[0] and new_grid[1] == old_grid[1]:
        return pos_embed
    patches, token = remove_middle(pos_embed)
    grid = patches.reshape(1, old_grid[0], old_grid[1], -1).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, size=[new_grid[0], new_grid[1]], mode="bicubic", align_corners=False, antialias=True)
    patches = grid.permute(0, 2, 3, 1).reshape(1, new_grid[0] * new_grid[1], -1).to(pos_embed.dtype)
    return insert_middle(patches, token)
