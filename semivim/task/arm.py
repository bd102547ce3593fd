"""Autoregressive pretraining (ARM) as a timm training task, and its loss on held-out images (Semi-ViM section 4.3)."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from semivim.loss.patch_pixels import denormalise_patches, normalise_patches, patch_loss, patchify, unpatchify
from semivim.runs.progress import Progress
from semivim.utils.user_error import UserError


class ArmTask(TrainingTask):
    """Mean squared error of the normalised pixels of every cluster, predicted from the clusters before it.

    Args:
        model: As :class:`~semivim.models.arm_decoder.ArmModel`.
        progress: Position of the run, which checkpoints hold as part of the task's state; a new one if None.

    Source: Ren et al. 2025 (ARM).
    """

    def __init__(
        self,
        model: nn.Module,
        progress: Progress | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(device=device, dtype=dtype)
        self.trainable_module = model
        self.progress = progress or Progress()

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

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> "ArmTask":
        """Wrap the model in DistributedDataParallel; pass ``device_ids=None`` on a CPU."""
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(  # type: ignore[override]
        self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any
    ) -> nn.Module:
        """Compile the model, before :meth:`prepare_distributed`."""
        compiled = torch.compile(self.trainable_module, backend=backend, mode=mode, **compile_kwargs)
        self.trainable_module = cast(nn.Module, compiled)
        return self.trainable_module

    # ARG002: timm passes its hooks more than this task reads
    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:  # noqa: ARG002
        """The run's progress."""
        return {"progress": self.progress.state_dict()}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,  # noqa: ARG002
        module: nn.Module | None = None,  # noqa: ARG002
        ema: bool = False,  # noqa: ARG002
    ) -> None:
        """Restore what :meth:`get_task_state` returned; None leaves everything as it is."""
        if state is not None:
            self.progress.load_state_dict(state["progress"])


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
    if dist.is_initialized():
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
