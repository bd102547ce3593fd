"""Autoregressive pretraining (ARM) as a timm training task, and its loss on held-out images (Semi-ViM section 4.3)."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import unwrap_model
from torch import Tensor

from semivim.loss.patch_pixels import denormalise_patches, normalise_patches, patch_loss, patchify, unpatchify
from semivim.task.run_task import RunTask
from semivim.utils.process_group import in_process_group
from semivim.utils.user_error import UserError


class ArmTask(RunTask):
    """Mean squared error of the normalised pixels of every cluster, predicted from the clusters before it.

    Args:
        model: As :class:`~semivim.models.arm_decoder.ArmModel`.
        progress: See :class:`~semivim.task.run_task.RunTask`.

    Source: Ren et al. 2025 (ARM).
    """

    @property
    def model(self) -> Any:
        """The model without the wrappers of ``torch.compile`` and of distributed training."""
        return unwrap_model(self.trainable_module)

    def forward(self, input: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Compute the loss of a batch.

        Args:
            input: Images, ``(b, c, h, w)``.

        Returns:
            ``loss``, with gradient.
        """
        prediction = self.trainable_module(input)
        target = self.model.targets(normalise_patches(patchify(input, self.model.patch_size)))
        return {"loss": patch_loss(prediction, target)}


@torch.inference_mode()
def held_out_loss(
    model: Any, loader: Iterable[tuple[Tensor, Any]], autocast: Callable[[], AbstractContextManager]
) -> dict[str, float]:
    """Loss of every pass over the images of all ranks, and that of predicting the mean of every patch.

    Args:
        model: As :class:`~semivim.models.arm_decoder.ArmModel`.
        loader: Batches of images on the model's device.
        autocast: Gives the context of a forward pass.

    Returns:
        ``loss``, and ``loss_of_zero`` to compare it with.

    Raises:
        UserError: If there is no image.
    """
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    for images, _ in loader:
        patches = normalise_patches(patchify(images, model.patch_size))
        for backward in model.passes():
            target = patches[:, model.predicted_positions(backward)]
            with autocast():
                prediction = model.predict(images, backward)
            loss, zero = patch_loss(prediction, target), target.square().mean()
            sums += len(images) * torch.stack([loss, zero, torch.ones_like(loss)]).double().cpu()
    if in_process_group():
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, sums)
        sums = torch.stack(parts).sum(0)
    loss_sum, zero_sum, count = sums.tolist()
    if not count:
        raise UserError("no held-out image can be read, wanted one to evaluate on")
    return {"loss": loss_sum / count, "loss_of_zero": zero_sum / count}


@torch.inference_mode()
def predicted_images(
    model: Any,
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    autocast: Callable[[], AbstractContextManager],
) -> list[tuple[str, Tensor]]:
    """What the forward pass reads and predicts of images, as images themselves.

    Args:
        model: As :class:`~semivim.models.arm_decoder.ArmModel`.
        images: ``(b, c, h, w)``, normalised.
        mean: Mean of each channel, of pixels in [0, 1].
        std: Standard deviation of each channel.
        autocast: Gives the context of a forward pass.

    Returns:
        Title and pixels, ``(b, c, h, w)``, uint8, of the images, of the clusters that are read, of the predicted ones
        (each patch with its true mean and contrast, which the loss does not ask for) and of the true ones; the mean
        colour where a cluster is not read or not predicted.
    """
    model.eval()
    patches = patchify(images, model.patch_size)
    read, predicted = model.read_positions(False), model.predicted_positions(False)
    with autocast():
        prediction = model.predict(images, False).float()
    columns = {"image": patches}
    columns["given"], columns["predicted"], columns["true"] = (torch.zeros_like(patches) for _ in range(3))
    columns["given"][:, read] = patches[:, read]
    columns["predicted"][:, predicted] = denormalise_patches(prediction, patches[:, predicted])
    columns["true"][:, predicted] = patches[:, predicted]
    scale, shift = (torch.tensor(x, device=images.device).view(-1, 1, 1) for x in (std, mean))
    normalised = {title: unpatchify(x, model.patch_size, model.grid) for title, x in columns.items()}
    return [(title, (255 * (x * scale + shift)).clamp(0, 255).byte().cpu()) for title, x in normalised.items()]
