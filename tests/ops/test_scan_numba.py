import os
import subprocess
import sys

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from semivim.ops import scan_numba, selective_scan
from tests.ops.scan_cases import (
    bidirectional_inputs,
    bidirectional_scan,
    forward_of,
    gradients_of,
    in_float64,
    mixing,
    run,
    selective_inputs,
)
from tests.tolerance import assert_close


@pytest.fixture
def poisoned():
    torch.use_deterministic_algorithms(True)  # fills empty tensors, scratch too, with NaN
    yield
    torch.use_deterministic_algorithms(False)


def assert_same_bits(a, b):
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_same_bits_twice_and_on_two_threads(dtype):
    inputs = bidirectional_inputs(3, 150, 72, 16, dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(bidirectional_scan, inputs, backend="numba", **mixing(3)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(results[0], other)


@pytest.mark.parametrize("l", (1, 63, 65))
@pytest.mark.parametrize("d", (1, 16, 70))
def test_poisoned_memory(poisoned, l, d):
    inputs = bidirectional_inputs(2, l, d, 5)
    expected = in_float64(bidirectional_scan, inputs)
    result = run(bidirectional_scan, inputs, backend="numba")
    for name in expected:
        assert_close(name, result[name], expected[name], "float32_grad")
    assert torch.isfinite(forward_of(scan_numba, inputs)[1]).all()


@pytest.mark.usefixtures("poisoned")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 40), st.integers(1, 18)),
    delta=st.sampled_from((0.0, 1e-6, 1.0, 30.0, 1e3)),
    rate=st.sampled_from((0.0, 1e-8, 1.0, 100.0)),
    bias=st.sampled_from((-100.0, -5.0, 0.0, 50.0)),
    mixed=st.booleans(),
    permuted=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_drawn_shapes_strides_and_extreme_values(sizes, delta, rate, bias, mixed, permuted, seed):
    inputs = bidirectional_inputs(*sizes, seed=seed)
    for name in inputs:
        scale = {"d": delta, "A": rate / 4}.get(name[0], 1.0) if not name.startswith("delta_bias") else 1.0
        inputs[name] = inputs[name] * scale + (bias if name.startswith("delta_bias") else 0.0)
        if permuted and inputs[name].dim() == 3:
            inputs[name] = inputs[name].transpose(0, 2).contiguous().transpose(0, 2)
    mix = mixing(sizes[0]) if mixed else {}
    result, expected = (
        run(bidirectional_scan, inputs, backend="numba", **mix),
        in_float64(bidirectional_scan, inputs, **mix),
    )
    for name in expected:
        assert_close(name, result[name], expected[name], "float32_grad")


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 70), st.integers(1, 20), st.integers(1, 9)),
    missing=st.sets(st.sampled_from(("D", "z", "delta_bias"))),
    softplus=st.booleans(),
    reverse=st.booleans(),
)
def test_drawn_selective_scans(sizes, missing, softplus, reverse):
    inputs = {name: x for name, x in selective_inputs(*sizes).items() if name not in missing}
    if not softplus:
        inputs["delta"] = inputs["delta"].abs() + 3  # positive with any bias
    options = {"delta_softplus": softplus, "reverse": reverse}
    result, expected = (
        run(selective_scan, inputs, backend="numba", **options),
        in_float64(selective_scan, inputs, **options),
    )
    for name in expected:
        assert_close(name, result[name], expected[name], "float32_grad")


def test_no_step_keeps_the_state_exactly():
    # delta = 0: the decay is 1 and nothing enters, whatever A.
    inputs = selective_inputs(1, 40, 3, 4, bare=True)
    inputs["delta"][..., 1:] = 0
    inputs["B"][..., 0], inputs["C"][:] = 1, 1
    out = selective_scan(**inputs, backend="numba")
    assert torch.equal(out, out[..., :1].expand_as(out))


def test_nan_is_not_hidden():
    for name in ("u", "delta", "A", "z"):
        inputs = selective_inputs(1, 20, 3, 4)
        inputs[name].flatten()[0] = float("nan")
        assert torch.isnan(selective_scan(**inputs, delta_softplus=True, backend="numba")[0, 0]).any(), name


def test_channel_last_memory_is_not_copied(monkeypatch):
    x = {
        name: t.transpose(1, 2).contiguous().transpose(1, 2) if t.dim() == 3 else t
        for name, t in selective_inputs(1, 20, 16, 4).items()
    }
    copies = []
    contiguous = torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t, **k: copies.append(t.dim()) or contiguous(t, **k))
    out = selective_scan(**x, backend="numba")
    assert 3 not in copies
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_runs_its_own_threads():
    code = """
import os, torch
from semivim.ops import selective_scan
torch.set_num_threads(2)
x = torch.rand(2, 70, 9)
def scan(): return selective_scan(x, x, -torch.ones(70, 4), x[:, :4], x[:, :4], backend="numba")
expected = scan()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(scan(), expected) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=120, check=False).returncode == 0


@pytest.mark.parametrize("n", (1, 5))
def test_saved_states_may_come_back_in_another_dtype(n):
    inputs = bidirectional_inputs(2, 70, 20, n)
    out, saved = forward_of(scan_numba, inputs)
    grad = torch.randn_like(out)
    expected, actual = (gradients_of(scan_numba, grad, inputs, None, x) for x in (saved, saved.double()))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
