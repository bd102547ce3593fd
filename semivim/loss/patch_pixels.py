"""Pixels of image patches as regression targets (ARM; the normalisation is MAE's).

Dimensions: ``b`` images, ``c`` channels, ``p`` side of a patch in pixels, ``g`` patches of an image, ``P = c p^2``.
"""

from torch import Tensor
from torch.nn import functional as F

EPS = 1e-6  # added to a patch's variance


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches, in raster order; pixels of a patch in (row, column, channel) order.

    Args:
        images: ``(b, c, h, w)``.
        patch_size: p, which divides h and w.

    Returns:
        ``(b, g, P)``.
    """
    b, c, h, w = images.shape
    x = images.reshape(b, c, h // patch_size, patch_size, w // patch_size, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch_size * patch_size * c)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Put patches together to images, the inverse of :func:`patchify`.

    Args:
        patches: ``(b, g, P)``, in raster order.
        patch_size: p.
        grid: Rows and columns of patches.

    Returns:
        ``(b, c, h, w)``.
    """
    rows, columns = grid
    x = patches.reshape(len(patches), rows, columns, patch_size, patch_size, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, rows * patch_size, columns * patch_size)


def normalise_patches(patches: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + 1e-6) over the pixels and channels of each patch together, with the unbiased variance.

    The mean square of the result is (P - 1) / P, less where a patch is nearly constant: the loss of predicting 0.

    Args:
        patches: x, ``(b, g, P)``.

    Returns:
        ``(b, g, P)``.
    """
    mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return (patches - mean) / (var + EPS).sqrt()


def denormalise_patches(normalised: Tensor, patches: Tensor) -> Tensor:
    """Give normalised pixels the mean and the contrast of other patches, the inverse of :func:`normalise_patches`.

    Args:
        normalised: ``(b, g, P)``.
        patches: Patches whose mean and variance the result has where ``normalised`` is theirs, ``(b, g, P)``.

    Returns:
        ``(b, g, P)``.
    """
    mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    return normalised * (var + EPS).sqrt() + mean


def patch_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all pixels of all patches, in float32.

    Args:
        prediction: ``(b, l, P)``.
        target: Normalised pixels, ``(b, l, P)``.

    Returns:
        0-d.
    """
    return F.mse_loss(prediction.float(), target)
