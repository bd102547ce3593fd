"""LyapEmaV3: the algorithm's equations, invariants and effect."""

import logging
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from semivim.utils.lyap_ema import LyapEmaV3
from tests.utils.lyap_toy import (
    PROJECTING,
    assert_same,
    copies,
    distance,
    make_model,
    make_optimizer,
    snapshot,
    teacher_of,
    train_step,
    trained,
)

# --- invariants 1 to 4: what an update does --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [*PROJECTING, "literal"])
def test_update_keeps_the_identities_of_the_algorithm(mode: str) -> None:
    model = make_model()
    ema = LyapEmaV3(model, mode=mode)
    optimizer = make_optimizer(model)
    ema.attach(optimizer, model)
    guarded, ref = 0, None
    for step in range(1, 61):
        for group in optimizer.param_groups:
            group["lr"] = (0.3 if 20 <= step < 30 else 0.01) * group.get("lr_scale", 1.0)
        train_step(model, optimizer, step)
        before, v_prev = snapshot(ema.module), ema.v
        teacher_before = copies(teacher_of(ema, model))
        stats = ema.update(model)
        after, student = ema.module.state_dict(), model.state_dict()

        for name, value in after.items():
            if value.is_floating_point():
                expected = stats.alpha * before[name].double() + (1 - stats.alpha) * student[name].double()
                torch.testing.assert_close(value.double(), expected, rtol=2e-7, atol=2e-7)
            else:
                assert torch.equal(value, student[name])
        gap = distance(trained(model), teacher_of(ema, model))
        assert math.sqrt(2 * stats.v) == pytest.approx(gap, rel=1e-6, abs=1e-7)
        assert stats.distance == pytest.approx(distance(trained(model), teacher_before), rel=1e-5)
        assert stats.v_prev == v_prev
        assert ema.v == stats.v
        assert ema.min_decay <= stats.alpha <= ema.decay
        ref = stats.distance if ref is None else ref
        scaled = stats.distance / {"default": ref, "paper_stable": stats.teacher_norm, "literal": 1.0}[mode]
        expected = ema.min_decay + (ema.decay - ema.min_decay) * (2 / (1 + math.exp(-ema.gamma * scaled)) - 1)
        assert stats.alpha == pytest.approx(expected, rel=1e-9)
        ref = 0.99 * ref + 0.01 * stats.distance
        if mode in PROJECTING:
            norm = math.sqrt(sum(t.double().square().sum().item() for t in teacher_before if t.ndim > 1))
            bound = max((1 - 1e-3) * v_prev, 0.5 * (ema.v_radius * norm) ** 2)
            assert stats.bound == pytest.approx(bound, rel=1e-5)
            assert stats.v <= (1 + 1e-5) * bound
            guarded += stats.violated
    if mode in PROJECTING:
        assert guarded >= 5


def test_guard_moves_the_student_along_the_line_to_its_teacher() -> None:
    model = make_model()
    ema = LyapEmaV3(model)
    teacher = copies(teacher_of(ema, model))
    with torch.no_grad():
        for p in trained(model):
            p.add_(torch.randn_like(p))
    far = copies(trained(model))
    frozen, buffers = model[3].bias.clone(), snapshot(model[1])
    stats = ema.update(model, 1)
    c = 1 / (1 + stats.pull)
    assert stats.violated
    assert 0 < c < 1
    for s, u, t in zip(trained(model), far, teacher, strict=True):
        torch.testing.assert_close(s, t + c * (u - t), rtol=1e-5, atol=1e-6)
    assert torch.equal(model[3].bias, frozen)
    assert_same(
        {k: v for k, v in model[1].state_dict().items() if "running" in k or "num" in k},
        {k: v for k, v in buffers.items() if "running" in k or "num" in k},
    )


class WithConstants(nn.Module):
    """A weight beside parameters whose size says nothing on how far the function may move."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.A_log = nn.Parameter(torch.full((50, 50), 3.0))
        self.gain = nn.Parameter(torch.full((100,), 5.0))

    def no_weight_decay(self) -> set[str]:
        return {"*A_log"}


def test_ball_is_relative_to_what_weight_decay_acts_on() -> None:
    model = WithConstants()
    ema = LyapEmaV3(model)
    norm = model.weight.norm().item()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    stats = ema.update(model)
    assert stats.teacher_norm == pytest.approx(norm)
    assert stats.violated
    assert stats.alpha * stats.distance == pytest.approx(0.2 * norm)


class Parent(nn.Module):
    """A parent module with parameters that it takes out itself."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child
        self.table = nn.Parameter(torch.full((50, 50), 7.0))

    def no_weight_decay(self) -> set[str]:
        return {"table"}


@pytest.mark.parametrize("wrap", [nn.Sequential, Parent, lambda m: Parent(nn.ModuleDict({"a[b]": m})), lambda m: m])
def test_parent_module_does_not_change_the_ball(wrap: Callable[[nn.Module], nn.Module]) -> None:
    child = WithConstants()
    model = wrap(child)
    norm = child.weight.norm().item()
    assert LyapEmaV3(model).update(model).teacher_norm == pytest.approx(norm)


def test_tied_parameter_is_taken_out_under_any_of_its_names() -> None:
    child = WithConstants()
    model = nn.ModuleDict({"first": nn.ParameterList([child.A_log]), "second": child})
    assert LyapEmaV3(model).update(model).teacher_norm == pytest.approx(child.weight.norm().item())


def test_calm_training_is_left_alone() -> None:
    model = make_model()
    ema = LyapEmaV3(model)
    optimizer = make_optimizer(model, lr=1e-4)
    for step in range(1, 31):
        train_step(model, optimizer, step)
        before = snapshot(model)
        assert not ema.update(model, step).violated
        assert_same(model.state_dict(), before)


def test_student_on_its_teacher_is_a_fixed_point() -> None:
    model = make_model()
    ema = LyapEmaV3(model)
    before = snapshot(model)
    for step in range(1, 4):
        stats = ema.update(model, step)
        assert (stats.distance, stats.v, stats.violated) == (0.0, 0.0, False)
    assert_same(model.state_dict(), before)
    assert_same(ema.module.state_dict(), before)


# --- invariant 5, warm-up and the first update -----------------------------------------------------------------------


def test_gamma_zero_gives_min_decay() -> None:
    model = make_model()
    ema = LyapEmaV3(model, gamma=0.0)
    train_step(model, make_optimizer(model), 0)
    assert ema.update(model).alpha == 0.99


def test_large_gamma_freezes_the_literal_teacher() -> None:
    model = make_model()
    ema = LyapEmaV3(model, mode="literal", gamma=1e9)
    optimizer = make_optimizer(model)
    ema.attach(optimizer, model)
    before = copies(teacher_of(ema, model))
    for step in range(5):
        train_step(model, optimizer, step)
        assert ema.update(model).alpha == 1.0
    assert distance(before, teacher_of(ema, model)) == 0.0


@pytest.mark.parametrize("mode", PROJECTING)
def test_first_update_does_not_overwrite_a_better_teacher(mode: str) -> None:
    model = make_model()
    ema = LyapEmaV3(model, mode=mode)
    train_step(model, make_optimizer(model), 0)
    before = copies(teacher_of(ema, model))
    gap = distance(before, trained(model))
    stats = ema.update(model, 1)
    assert distance(before, teacher_of(ema, model)) == pytest.approx((1 - stats.alpha) * gap, rel=1e-4)
    assert 0.3 < stats.alpha < 1.0


def test_update_after_step_copies_until_then_and_warmup_counts_from_there() -> None:
    model = make_model()
    ema = LyapEmaV3(model, update_after_step=5)
    optimizer = make_optimizer(model)
    for step in range(1, 7):
        train_step(model, optimizer, step)
        stats = ema.update(model, step)
        assert (stats.alpha, stats.v) == (0.0, 0.0)
        assert_same(ema.module.state_dict(), model.state_dict())
    train_step(model, optimizer, 7)
    assert ema.update(model, 7).alpha == pytest.approx(1 - 3 ** (-2 / 3))


def test_warmup_caps_alpha_then_leaves_it() -> None:
    ema = LyapEmaV3(make_model())
    caps = [ema.get_decay(step) for step in (0, 1, 10, 1000, 10**7)]
    assert caps == sorted(caps)
    assert caps[0] == caps[1] == pytest.approx(1 - 2 ** (-2 / 3))
    assert caps[-1] == ema.get_decay() == 0.9999
    assert LyapEmaV3(make_model(), use_warmup=False).get_decay(1) == 0.9999


# --- the guard at work -----------------------------------------------------------------------------------------------


def self_training_loss(v_radius: float, spike: float) -> float:
    """Loss of a teacher that sets its own targets from step 200 on, as the learning rate rises ``spike``-fold."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 5))
    ema = LyapEmaV3(model, decay=0.95, min_decay=0.95, v_radius=v_radius)  # one decay: only the guard differs
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    label = nn.Linear(12, 5).requires_grad_(False)
    for step in range(1, 301):
        x = torch.randn(64, 12, generator=generator)
        optimizer.param_groups[0]["lr"] = 3e-3 * (spike if 200 <= step < 220 else 1)
        target = label(x) if step < 200 else ema(x).detach()
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(model)
    x = torch.randn(500, 12, generator=generator)
    return (ema(x) - label(x)).square().mean().item()


def test_guard_turns_a_learning_rate_spike_into_a_recovery() -> None:
    """0.0050 with the guard and 3.94 without; in calm training the guard changes nothing."""
    off = 1e9
    assert self_training_loss(v_radius=0.2, spike=100) < 0.01 * self_training_loss(v_radius=off, spike=100)
    assert self_training_loss(v_radius=0.2, spike=1) == self_training_loss(v_radius=off, spike=1)


def test_guard_that_rules_the_training_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model()
    ema = LyapEmaV3(model, v_radius=1e-4)
    optimizer = make_optimizer(model)
    with caplog.at_level(logging.WARNING):
        for step in range(300):
            train_step(model, optimizer, step)
            ema.update(model)
    assert 0.2 < ema.guard_rate < 0.27
    assert caplog.text.count("raise v_radius") == 1


def test_half_precision_student_is_held_to_the_bound() -> None:
    model = make_model(torch.bfloat16)
    ema = LyapEmaV3(model, dtype=torch.float32)
    teacher = copies(teacher_of(ema, model))
    with torch.no_grad():
        for p in trained(model):
            p.add_(torch.randn_like(p))
    stats = ema.update(model)
    assert stats.violated
    assert distance(trained(model), teacher) == pytest.approx(stats.distance, rel=2e-2)
    assert next(ema.module.parameters()).dtype == torch.float32
