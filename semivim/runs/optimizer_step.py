"""One optimizer step over any loss, with gradient accumulation, mixed precision and clipping."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from timm.task import TrainingTask
from timm.utils import NativeScaler, dispatch_clip_grad
from torch import Tensor

from semivim.runs.progress import add_up
from semivim.utils.process_group import in_process_group
from semivim.utils.user_error import UserError

Batch = TypeVar("Batch")


class StepResult(NamedTuple):
    """What a step did.

    ``taken`` is False where a gradient was not finite and the weights were left as they were. ``figures`` holds the
    sums of what ``forward`` returned for each batch, the number of ``batches``, and ``skipped``: 1 for a step that was
    not taken, on rank 0, so that it is counted once.
    """

    taken: bool
    figures: dict[str, Tensor]


def optimizer_step(
    task: TrainingTask,
    batches: Sequence[Batch],
    forward: Callable[[Batch], tuple[Tensor, dict[str, Tensor]]],
    optimizer: torch.optim.Optimizer,
    *,
    autocast: Callable[[], AbstractContextManager],
    scaler: NativeScaler | None,
    clip: dict[str, Any],
) -> StepResult:
    """Take one step with the mean gradient of one or more accumulated batches.

    Args:
        task: Says which parameters are clipped, and delays the gradients' reduction until the last batch.
        batches: What ``forward`` takes, one after the other.
        forward: Gives the loss of a batch, and figures to sum: 0-d tensors without gradient.
        optimizer: Of the task's parameters.
        autocast: Gives the context of a forward pass.
        scaler: Scales the loss of float16 training; None for none.
        clip: ``clip_grad`` (None for none) and ``clip_mode``, as timm's ``dispatch_clip_grad`` knows them.
    """
    sums: dict[str, Tensor] = {}
    parameters = list(task.get_clip_parameters(exclude_head=clip["clip_mode"] == "agc"))
    scale = scaler.state_dict()["scale"] if scaler is not None else 1.0
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        with nullcontext() if last else task.no_sync():
            with autocast():
                loss, figures = forward(batch)
            loss = loss / len(batches)
            if scaler is not None:
                scaler(loss, optimizer, parameters=parameters, need_update=last, **clip)
            else:
                loss.backward()
        add_up(sums, figures)
    if scaler is not None:  # it takes the step itself, or leaves it out and lowers its scale
        taken = scaler.state_dict()["scale"] >= scale
    else:
        gradients = [p.grad for p in task.get_clip_parameters() if p.grad is not None]
        taken = bool(torch.nn.utils.get_total_norm(gradients).isfinite())
        if taken:
            if clip["clip_grad"] is not None:
                dispatch_clip_grad(parameters, clip["clip_grad"], mode=clip["clip_mode"])
            optimizer.step()
    optimizer.zero_grad()
    counted = not taken and not (in_process_group() and dist.get_rank())  # all ranks skip a step alike
    sums |= {"batches": torch.tensor(float(len(batches))), "skipped": torch.tensor(float(counted))}
    return StepResult(taken, sums)


class SkippedSteps:
    """Ends a run that meets nothing but gradients that are not finite.

    Args:
        last: Checkpoint that the caller then makes hold the last good state, for the error.
        limit: Steps in a row that may be skipped.
    """

    def __init__(self, last: Path, limit: int = 20) -> None:
        self.last, self.limit = last, limit
        self.in_a_row = 0

    def count(self, taken: bool, update: int) -> None:
        """Count a step.

        Args:
            taken: See :class:`StepResult`.
            update: Updates before it.

        Raises:
            UserError: If too many in a row were skipped.
        """
        self.in_a_row = 0 if taken else self.in_a_row + 1
        if self.in_a_row > self.limit:
            raise UserError(
                f"gradients were not finite in {self.in_a_row} steps in a row at update {update}: "
                f"{self.last} holds the last good state: go on from it with --resume auto and a lower --lr, "
                "with --clip-grad, or without --amp"
            )


def update_seed(seed: int, update: int, rank: int) -> int:
    """Seed of one rank's update, in [0, 2**32): no two ranks come near each other's in any run of realistic length."""
    # the golden ratio of 2**32 spreads the ranks; on one rank seeds of consecutive updates follow each other
    return (seed * 1_000_003 + update + rank * 2_654_435_761) % 2**32


def mean_lr(optimizer: torch.optim.Optimizer) -> float:
    """Learning rate as timm logs it, the mean over parameter groups."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return sum(rates) / len(rates)
