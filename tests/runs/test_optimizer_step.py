from contextlib import nullcontext

import pytest
import torch
from timm.task import TrainingTask
from torch import nn

from semivim.runs.optimizer_step import SkippedSteps, mean_lr, optimizer_step, update_seed
from semivim.utils.user_error import UserError

OFF = {"clip_grad": None, "clip_mode": "norm"}


class Regression(TrainingTask):
    """A task without labels: the step must need nothing else of a task."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trainable_module = nn.Linear(4, 3)
        self.synced = []

    def get_trainable_module(self, ema=False):
        return self.trainable_module

    def no_sync(self):
        self.synced.append(False)
        return nullcontext()

    def forward(self, x):
        return self.trainable_module(x).square().mean()


def make(lr=0.1):
    task = Regression()
    return task, torch.optim.SGD(task.parameters(), lr=lr)


def batch(seed, scale=1.0):
    return scale * torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))


def step(task, optimizer, batches, clip=OFF, autocast=nullcontext):
    def forward(x):
        loss = task(x)
        return loss, {"loss": loss.detach()}

    return optimizer_step(task, batches, forward, optimizer, autocast=autocast, scaler=None, clip=clip)


def test_accumulated_batches_take_one_step_with_the_mean_gradient():
    task, optimizer = make()
    reference, _ = make()
    before = task.trainable_module.weight.detach().clone()
    batches = [batch(1), batch(2), batch(3)]
    result = step(task, optimizer, batches)
    assert result.taken
    assert task.synced == [False, False]  # ranks meet at the last batch only
    loss = sum(reference(b) for b in batches)
    (loss / 3).backward()
    expected = before - 0.1 * reference.trainable_module.weight.grad
    torch.testing.assert_close(task.trainable_module.weight, expected)
    figures = {name: value.item() for name, value in result.figures.items()}
    assert figures == {"loss": pytest.approx(loss.item()), "batches": 3.0, "skipped": 0.0}


def test_gradient_that_is_not_finite_changes_nothing():
    task, optimizer = make()
    before = [p.detach().clone() for p in task.parameters()]
    result = step(task, optimizer, [batch(1, scale=float("inf"))])
    assert not result.taken
    assert result.figures["skipped"] == 1.0
    assert all(torch.equal(p, q) for p, q in zip(task.parameters(), before, strict=True))
    assert step(task, optimizer, [batch(1)]).taken


@pytest.mark.parametrize("rank", [0, 1])
def test_step_that_all_ranks_skip_is_counted_once(rank, monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: rank)
    result = step(*make(), [batch(1, scale=float("inf"))])
    assert not result.taken
    assert result.figures["skipped"] == (rank == 0)


def test_clipping_bounds_the_step():
    task, optimizer = make(lr=1.0)
    before = [p.detach().clone() for p in task.parameters()]
    step(task, optimizer, [batch(1, scale=100.0)], {"clip_grad": 0.5, "clip_mode": "norm"})
    moved = sum((p - q).square().sum() for p, q in zip(task.parameters(), before, strict=True))
    assert moved.sqrt().item() == pytest.approx(0.5, rel=1e-3)


def test_forward_runs_under_autocast_and_backward_does_not():
    task, optimizer = make()
    seen = []

    class Context:
        def __enter__(self):
            seen.append("in")

        def __exit__(self, *_):
            seen.append("out")

    task.trainable_module.register_forward_hook(lambda *_: seen.append("forward"))
    task.trainable_module.weight.register_hook(lambda _: seen.append("backward"))
    step(task, optimizer, [batch(1)], autocast=Context)
    assert seen == ["in", "forward", "out", "backward"]


def test_steps_skipped_in_a_row_end_the_run():
    skipped = SkippedSteps("run/last.pth.tar", limit=2)
    for update, taken in enumerate([False, False, True, False, False]):
        skipped.count(taken, update)
    with pytest.raises(UserError, match=r"not finite in 3 steps in a row at update 5: run/last\.pth\.tar"):
        skipped.count(False, 5)


def test_no_two_ranks_share_random_numbers():
    """The seeds of a rank are consecutive; a million updates of each of 64 ranks lie apart on the ring of seeds."""
    starts = sorted(update_seed(42, 0, rank) for rank in range(64))
    gaps = [b - a for a, b in zip(starts, [*starts[1:], starts[0] + 2**32], strict=True)]
    assert min(gaps) > 1_000_000
    assert update_seed(42, 7, 3) == (update_seed(42, 0, 3) + 7) % 2**32
    assert update_seed(43, 0, 0) - update_seed(42, 0, 0) > 1_000_000
    assert 0 <= update_seed(2**31 - 1, 10**9, 1000) < 2**32


def test_rate_is_the_mean_over_groups():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [parameters[0]], "lr": 0.1}, {"params": [parameters[1]], "lr": 0.3}])
    assert mean_lr(optimizer) == pytest.approx(0.2)
