"""Evaluation batches: every image with its label, once; and a sample of images without labels."""

import logging
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from semivim.data.prefetch import prefetch
from semivim.data.sources import ImageSource, UnreadableImageError
from semivim.data.streams import ImageStream, StreamLoader
from semivim.data.views import Pixels, View
from semivim.utils.stop_signal import leave_signals_to_the_parent
from semivim.utils.terminal import escape
from semivim.utils.user_error import UserError

_logger = logging.getLogger(__name__)


class LabelledBatch(NamedTuple):
    """Images with labels, on the device."""

    image: Tensor  # (b, c, h, w), float32
    label: Tensor  # (b,), int64


class _Images(Dataset):
    """Images with labels in one fixed view; an unreadable one is an error, or left out."""

    def __init__(self, source: ImageSource, view: View, positions: np.ndarray, skip_unreadable: bool) -> None:
        self.source, self.view, self.positions = source, view, positions
        self.skip_unreadable = skip_unreadable
        self.warned: set[int] = set()

    def __len__(self) -> int:
        return len(self.positions)

    def __getitems__(self, places: list[int]) -> tuple[Pixels, Tensor] | None:
        """Load a batch; None where no image of it can be read."""
        found = {position: image for position in self.positions[places].tolist() if (image := self._image(position))}
        if not found:
            return None
        return self.view(list(found.values()), [0] * len(found)), torch.from_numpy(self.source.labels[list(found)])

    def _image(self, position: int) -> Image.Image | None:
        try:
            return self.source.image(position)
        except UnreadableImageError as error:
            if not self.skip_unreadable:
                raise
            if position not in self.warned:
                self.warned.add(position)
                _logger.warning("left out of the evaluation: %s", escape(str(error)))
            return None


class EvaluationLoader:
    """Yields every image with its label exactly once, over all ranks together, in each iteration.

    Args:
        source: Images, all with known labels unless ``positions`` is given.
        view: A view with ``is_training=False``.
        batch_size: Images of one batch; the last one may be smaller.
        device: Where batches go.
        num_workers: Worker processes; 0 loads in this process.
        pin_memory: Load batches into page-locked memory, so that copies to a GPU overlap with computation.
        rank: This process, which gets every ``world_size``-th image.
        world_size: Number of processes.
        positions: Images to take, ``(n,)``, whose labels are not needed, without those that cannot be read; None for
            all.

    Raises:
        UserError: If an image has no known label, and while iterating if one cannot be read.
    """

    def __init__(
        self,
        source: ImageSource,
        view: View,
        batch_size: int,
        device: torch.device | str = "cpu",
        num_workers: int = 0,
        pin_memory: bool = False,
        rank: int = 0,
        world_size: int = 1,
        positions: np.ndarray | None = None,
    ) -> None:
        unknown = np.flatnonzero(source.labels < 0)
        if positions is None and len(unknown):
            first = source.describe(unknown[0])
            raise UserError(f"{len(unknown)} evaluation images have no label, the first is {first}")
        self.view, self.device = view, torch.device(device)
        chosen = np.arange(len(source)) if positions is None else positions
        self.loader = DataLoader(
            _Images(source, view, chosen[rank::world_size], skip_unreadable=positions is not None),
            batch_size=batch_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=leave_signals_to_the_parent,
            collate_fn=_already_collated,
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[LabelledBatch]:
        return prefetch((drawn for drawn in self.loader if drawn is not None), self._move, self.device)

    def _move(self, drawn: tuple[Pixels, Tensor]) -> LabelledBatch:
        pixels, label = drawn
        return LabelledBatch(self.view.load(pixels, self.device), label.to(self.device, non_blocking=True))


def sample_images(
    source: ImageSource,
    positions: np.ndarray,
    view: View,
    batch_size: int,
    num_images: int,
    *,
    seed: int = 42,
    rank: int = 0,
    world_size: int = 1,
    **loading: Any,
) -> Iterator[Tensor]:
    """Yield a random sample of images, without labels, in batches on the device; the same ones at each call.

    Args:
        source: Images.
        positions: Those to draw from; unreadable ones are replaced by others.
        view: A view with ``is_training=False``.
        batch_size: Images of one batch.
        num_images: Images of the sample, over all ranks; whole batches, so at least so many.
        seed: Seed of the draw.
        rank: This process.
        world_size: Number of processes, each of which gets as many batches.
        **loading: ``device``, ``num_workers`` and ``pin_memory`` of ``StreamLoader``.

    Yields:
        ``(b, c, h, w)``, float32.
    """
    stream = ImageStream(source, positions, [view], batch_size, seed=seed, stream=2, rank=rank, world_size=world_size)
    num_batches = -(-num_images // (batch_size * world_size))
    with closing(StreamLoader([stream], **loading).steps()) as steps:
        for (batch,) in islice(steps, num_batches):
            yield batch.views[0]


def _already_collated(batch: Any) -> tuple[Pixels, Tensor] | None:
    return batch
