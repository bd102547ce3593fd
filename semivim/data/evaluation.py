"""Images with labels, each once, for evaluation."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from semivim.data.sources import ImageSource
from semivim.data.views import View, _private_randomness


class LabelledBatch(NamedTuple):
    """Images with labels."""

    image: Tensor  # (b, c, h, w)
    label: Tensor  # (b,), int64


class EvaluationImages(Dataset):
    """Images with labels in one fixed view; an unreadable one is an error."""

    def __init__(self, source: ImageSource, view: View, positions: np.ndarray) -> None:
        self.source, self.view, self.positions = source, view, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitems__(self, places: list[int]) -> LabelledBatch:
        index = self.positions[places]
        images = [self.source.image(int(position)) for position in index]
        with _private_randomness():
            return LabelledBatch(self.view(images, [0] * len(images)), torch.from_numpy(self.source.labels[index]))


def create_eval_loader(
    source: ImageSource,
    view: View,
    batch_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """Give every image with its label exactly once, over all ranks together.

    Args:
        source: Images, all with known labels.
        view: A view with ``is_training=False``.
        batch_size: Images of one batch; the last one may be smaller.
        num_workers: Worker processes; 0 loads in this process.
        pin_memory: Put batches into page-locked memory.
        rank: This process, which gets every ``world_size``-th image.
        world_size: Number of processes.

    Returns:
        A loader of ``LabelledBatch``.

    Raises:
        ValueError: If an image has no known label.
    """
    unknown = np.flatnonzero(source.labels < 0)
    if len(unknown):
        raise ValueError(f"{len(unknown)} evaluation images have no label, the first is {source.describe(unknown[0])}")
    positions = np.arange(rank, len(source), world_size)
    return DataLoader(
        EvaluationImages(source, view, positions),
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=_already_collated,
    )


def _already_collated(batch: Any) -> LabelledBatch:
    return batch
