"""The equations of LyapEMA."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semivim.utils.lyapunov import adaptive_decay, lyapunov_bound, lyapunov_value, projection_factor


@given(
    delta=st.floats(1e-6, 1e6),
    norm=st.floats(1e-6, 1e6),
    v_prev=st.floats(1e-6, 1e6),
    gamma=st.floats(0.0, 1e3),
    radius=st.floats(1e-3, 1.0),
    decay=st.floats(0.0, 1.0),
    share=st.floats(0.0, 1.0),
)
@settings(deadline=None)
def test_projection_meets_the_bound_whatever_the_numbers(delta, norm, v_prev, gamma, radius, decay, share) -> None:
    min_decay = share * decay
    bound = lyapunov_bound(v_prev, norm, radius)
    alpha = adaptive_decay(delta, gamma, min_decay, decay)
    assert min_decay <= alpha <= decay * (1 + 1e-12)
    if lyapunov_value(alpha, delta) > bound:
        c = projection_factor(bound, alpha, delta)
        shorter = adaptive_decay(c * delta, gamma, min_decay, decay)
        assert 0.0 < c < 1.0
        assert shorter <= alpha
        assert lyapunov_value(shorter, c * delta) <= bound * (1 + 1e-12)


def test_adaptive_decay_is_eq_9_between_a_half_and_one() -> None:
    for scaled in (0.0, 0.3, 2.0, 50.0):
        eq_9 = torch.sigmoid(torch.tensor(0.7 * scaled, dtype=torch.float64)).item()
        assert adaptive_decay(scaled, 0.7, 0.5, 1.0) == pytest.approx(eq_9, rel=1e-14)
    assert adaptive_decay(0.0, 3.0, 0.99, 0.9999) == 0.99
    assert adaptive_decay(1.0, 3.0, 0.99, 0.9999) == pytest.approx(0.99 + 0.905 * 0.0099, rel=1e-5)
