"""Algorithm 1 as printed: its equations, and that it stops training."""

import logging
import math

import pytest
import torch

from semivim.utils.lyap_ema import LyapEmaV3
from tests.utils.lyap_toy import copies, make_model, make_optimizer, teacher_of, train_step, trained


def test_literal_first_step_fails_its_test_and_is_recomputed_once() -> None:
    model = make_model()
    ema = LyapEmaV3(model, mode="literal", pull=0.02, pull_step=0.03)
    optimizer = make_optimizer(model, name="sgd")
    ema.attach(optimizer, model)
    start = copies(trained(model))
    train_step(model, optimizer, 0)
    full = copies(trained(model))
    stats = ema.update(model)
    assert stats.violated
    assert stats.pull == ema.pull == 0.05
    assert stats.lr_scale == 0.5
    assert optimizer.param_groups[0]["lr"] == 0.5e-2
    assert optimizer.param_groups[0]["lr_scale"] == 0.5
    for s, s0, u in zip(trained(model), start, full, strict=True):
        torch.testing.assert_close(s, s0 + 0.5 * (u - s0))


def test_literal_pull_is_explicit() -> None:
    model = make_model()
    ema = LyapEmaV3(model, mode="literal", pull=0.1, gamma=0.5)
    ema.v = 1e9
    optimizer = make_optimizer(model, name="sgd")
    ema.attach(optimizer, model)
    with torch.no_grad():
        for p in trained(model):
            p.add_(0.1 * torch.randn_like(p))
    start, teacher = copies(trained(model)), copies(teacher_of(ema, model))
    train_step(model, optimizer, 0)
    full = copies(trained(model))
    stats = ema.update(model)
    assert not stats.violated
    for s, s0, u, t in zip(trained(model), start, full, teacher, strict=True):
        torch.testing.assert_close(s, u + 0.1 * (t - s0))
    assert stats.alpha == pytest.approx(1 / (1 + math.exp(-0.5 * stats.distance)))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_optimizer_displacement_is_linear_in_the_learning_rate(name: str) -> None:
    moved = []
    for scale in (1.0, 0.5):
        model = make_model()
        optimizer = make_optimizer(model, name=name)
        for step in range(3):
            train_step(model, optimizer, step)
        optimizer.param_groups[0]["lr"] *= scale
        before = copies(trained(model))
        train_step(model, optimizer, 3)
        moved.append([a.double() - b.double() for a, b in zip(trained(model), before, strict=True)])
    for whole, half in zip(*moved, strict=True):
        torch.testing.assert_close(half, 0.5 * whole, rtol=1e-4, atol=2e-7)


def test_literal_stops_training(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model()
    with caplog.at_level(logging.WARNING):
        ema = LyapEmaV3(model, mode="literal")
    assert "stops training" in caplog.text
    optimizer = make_optimizer(model, lr=0.05)
    for step in range(200):
        train_step(model, optimizer, 1000 + step)
    ema.set(model)
    ema.attach(optimizer, model)
    lr_scale = []
    for step in range(40):
        train_step(model, optimizer, step)
        lr_scale.append(ema.update(model).lr_scale)
    assert lr_scale[0] == 0.5
    assert lr_scale[19] < 0.02
    assert lr_scale[39] < 2e-3


def test_literal_fails_where_v_stands_still() -> None:
    model = make_model()
    ema = LyapEmaV3(model, mode="literal")
    optimizer = make_optimizer(model, lr=0.0, name="sgd")
    ema.attach(optimizer, model)
    train_step(model, optimizer, 0)
    stats = ema.update(model)
    assert (stats.v, stats.v_prev, stats.violated) == (0.0, 0.0, True)


def test_literal_asks_to_be_attached() -> None:
    model = make_model()
    with pytest.raises(RuntimeError, match="attach"):
        LyapEmaV3(model, mode="literal").update(model)
