"""How far a run has come: what a resumed run needs beside its models and its optimizer."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from semivim.utils.process_group import in_process_group

SUMS = ("interval", "epoch", "run")  # of `Progress`, of which a new run has none yet


@dataclass
class Progress:
    """Position of a run, and what it has counted so far.

    Attributes:
        num_updates: Optimizer steps done, skipped ones included.
        num_epochs: Epochs finished, with their evaluation; some updates of the next may be done.
        interval: Sums of the figures of the steps since the last log line. All sums are those of this rank, and after
            :meth:`gather` rank 0 holds those of all ranks.
        epoch: Sums of the figures of the steps of the unfinished epoch.
        run: Sums of the figures of all steps.
        unreadable: Times each unreadable image was skipped, by its position, over all ranks.
        schedule: State of the learning rate schedule beyond its position (see ``schedule_state``).
    """

    num_updates: int = 0
    num_epochs: int = 0
    interval: dict[str, Tensor] = field(default_factory=dict)
    epoch: dict[str, Tensor] = field(default_factory=dict)
    run: dict[str, Tensor] = field(default_factory=dict)
    unreadable: dict[int, int] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)

    def add(self, figures: Mapping[str, Tensor]) -> None:
        """Count one update and add its figures to the sums, without waiting for the device."""
        self.num_updates += 1
        add_up(self.interval, figures)
        add_up(self.epoch, figures)
        add_up(self.run, figures)

    def gather(self, unreadable: dict[int, int]) -> None:
        """Move the sums of all processes to rank 0, which writes checkpoints; all have to call this.

        Args:
            unreadable: Times each unreadable image was skipped on this rank.
        """
        self.unreadable = sum_over_ranks(unreadable)
        for name in SUMS:
            setattr(self, name, _held_by_rank_0(add_over_ranks(getattr(self, name))))

    def restart(self, num_epochs: int, updates_per_epoch: int) -> None:
        """Move to the start of an epoch, where no figures are summed yet."""
        self.num_epochs, self.num_updates = num_epochs, num_epochs * updates_per_epoch
        self.interval, self.epoch = {}, {}

    def ramp(self, num_steps: int) -> float:
        """Share in (0, 1] that the next update has reached of a linear rise over ``num_steps`` updates; 1 for none."""
        return min(1.0, (self.num_updates + 1) / num_steps) if num_steps else 1.0

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` restores."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, the sums on rank 0 alone: they are those of all ranks.

        Raises:
            KeyError: If an entry is missing.
        """
        for item in fields(self):
            value = state[item.name]
            setattr(self, item.name, _held_by_rank_0(value) if item.name in SUMS else value)


def add_up(sums: dict[str, Tensor], figures: Mapping[str, Tensor]) -> None:
    """Add ``figures`` to ``sums``, key by key."""
    for key, value in figures.items():
        # sums out of a checkpoint are on the CPU
        sums[key] = sums[key].to(value.device) + value if key in sums else value


def _held_by_rank_0(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums on rank 0, zeros of the same shapes on the others."""
    if not in_process_group() or dist.get_rank() == 0:
        return sums
    return {name: torch.zeros_like(value) for name, value in sums.items()}


def add_over_ranks(figures: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add up figures over all processes, which all have to call this with the same names and shapes.

    Returns:
        The sums; of several processes float64, on the CPU.
    """
    if not in_process_group():
        return dict(figures)
    parts: list[dict[str, Tensor]] = [{}] * dist.get_world_size()
    # as objects: NCCL reduces no tensor of the CPU, where the sums out of a checkpoint are
    dist.all_gather_object(parts, {name: value.to("cpu", torch.float64) for name, value in figures.items()})
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in figures}


def sum_over_ranks(counts: dict[int, int]) -> dict[int, int]:
    """Sum counts over all processes, which all have to call this."""
    if not in_process_group():
        return dict(counts)
    parts: list[dict[int, int]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, counts)
    return dict(sum((Counter(part) for part in parts), Counter()))
