from contextlib import nullcontext

import pytest
import torch
from torch import nn

from semivim.data.two_views import LabelledBatch, SslBatch, UnlabelledBatch
from semivim.runs.optimizer_step import add_up, mean_lr, summarise, train_step, update_seed
from semivim.task.semi_supervised import SemiSupervisedTask

CPU = torch.device("cpu")
OFF = {"clip_grad": None, "clip_mode": "norm"}


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x.flatten(1))


def make(method="lyapema", lr=0.1):
    torch.manual_seed(0)
    task = SemiSupervisedTask(Student(), 3, method=method, threshold=0.0)
    task.setup_ema()
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=lr)
    task.trainable_module_ema.attach(optimizer, task.trainable_module)
    return task.train(), optimizer


def batch(seed, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    labelled = LabelledBatch(scale * torch.randn(4, 1, 2, 2, generator=g), torch.tensor([0, 1, 2, 0]))
    weak = torch.randn(6, 1, 2, 2, generator=g)
    unlabelled = UnlabelledBatch(weak, weak + 0.1, torch.tensor([0, 1, 2, -1, 0, 1]))
    return SslBatch(labelled, unlabelled, torch.empty(0, dtype=torch.int64))


def step(task, optimizer, batches, clip=OFF):
    return train_step(task, batches, optimizer, nullcontext, None, None, clip, CPU)


def test_accumulated_batches_take_one_step_with_the_mean_gradient():
    task, optimizer = make("supervised")
    reference, _ = make("supervised")
    before = task.trainable_module.linear.weight.detach().clone()
    batches = [batch(1), batch(2)]
    assert step(task, optimizer, batches)
    loss = sum(reference(b.labelled.image, b.labelled.label)["loss"] for b in batches) / 2
    loss.backward()
    expected = before - 0.1 * reference.trainable_module.linear.weight.grad
    torch.testing.assert_close(task.trainable_module.linear.weight, expected)


def test_gradient_that_is_not_finite_changes_nothing():
    task, optimizer = make()
    before = {k: v.clone() for k, v in task.state_dict().items()}
    assert not step(task, optimizer, [batch(1, scale=float("inf"))])
    task.update_ema(1)
    assert task.lyap_stats.skipped
    assert all(torch.equal(before[k], v) for k, v in task.state_dict().items())
    assert step(task, optimizer, [batch(1)])
    assert summarise(task.interval_sums, task)["skipped"] == 1.0


def test_clipping_bounds_the_step():
    task, optimizer = make(lr=1.0)
    before = [p.detach().clone() for p in task.trainable_module.parameters()]
    step(task, optimizer, [batch(1, scale=100.0)], {"clip_grad": 0.5, "clip_mode": "norm"})
    moved = sum((p - q).square().sum() for p, q in zip(task.trainable_module.parameters(), before, strict=True))
    assert moved.sqrt().item() == pytest.approx(0.5, rel=1e-3)


def test_figures_of_an_interval():
    task, optimizer = make()
    for seed in (1, 2):
        step(task, optimizer, [batch(seed)])
        task.update_ema(seed)
    values = summarise(task.interval_sums, task)
    assert values["kept_share"] == 1.0
    assert 0.0 <= values["pseudo_accuracy"] <= 1.0
    assert values["loss_labelled"] == pytest.approx(task.epoch_sums["loss_labelled"].item() / 2)
    assert values["skipped"] == 0.0
    assert {"alpha", "v", "distance", "guard_rate", "lr_scale"} <= set(values)


def test_unknown_labels_do_not_count_as_wrong():
    sums = {}
    result = {
        "loss_labelled": torch.tensor(1.0),
        "keep": torch.tensor([True, True, False, True]),
        "pseudo": torch.tensor([1, 2, 0, 0]),
    }
    add_up(sums, result, torch.tensor([1, 0, 0, -1]))
    assert {k: sums[k].item() for k in ("unlabelled", "kept", "known", "right")} == {
        "unlabelled": 4, "kept": 3, "known": 2, "right": 1,
    }  # fmt: skip


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
