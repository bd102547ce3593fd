"""A learning-rate spike on a Vim: LyapEMA keeps the teacher that the same average without a guard loses."""

import pytest

from benchmarks.lr_spike import SPIKE, SPIKE_STEPS, Trace, run

CALM_STEPS = 50


def spiked(teacher: str) -> Trace:
    sizes = {"batch_size": 8, "burnin_steps": 100, "calm_steps": CALM_STEPS, "after_steps": 40}
    return run(teacher, SPIKE, seed=0, **sizes)


@pytest.mark.slow
def test_guard_keeps_the_teacher_that_a_plain_average_loses() -> None:
    """On seeds 0, 1, 2: plain 77, 71, 73 % -> 18, 19, 12 -> 20, 30, 19; guarded -> 72, 66, 67 -> 76, 77, 75."""
    before, _, last = spiked("EMA 0.9999, warm-up").summary(CALM_STEPS)
    assert before > 60
    assert last < before - 30
    guarded = spiked("LyapEMA")
    before, lowest, last = guarded.summary(CALM_STEPS)
    assert before > 60
    assert lowest > before - 15
    assert last > before - 5
    assert guarded.guarded[guarded.steps.index(CALM_STEPS)] == 0
    assert 10 < guarded.guarded[-1] <= 2 * SPIKE_STEPS
