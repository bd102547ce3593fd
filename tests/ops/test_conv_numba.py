import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from tests.ops.conv_cases import bidirectional_conv, conv_inputs, run
from tests.tolerance import assert_close


@pytest.fixture
def poisoned():
    torch.use_deterministic_algorithms(True)  # fills empty tensors, scratch too, with NaN
    yield
    torch.use_deterministic_algorithms(False)


def by(backend):
    return lambda **x: bidirectional_conv(**x, backend=backend)


def test_same_bits_twice_and_on_two_threads():
    inputs = conv_inputs(3, 50, 72)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(by("numba"), inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.usefixtures("poisoned")
@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 70), st.integers(1, 6)),
    scale=st.sampled_from((0.0, 1.0, 1e3)),
    permuted=st.booleans(),
)
def test_drawn_shapes_strides_and_scales_in_poisoned_memory(sizes, scale, permuted):
    inputs = conv_inputs(*sizes)
    inputs["x"] = inputs["x"] * scale
    if permuted:
        inputs["x"] = inputs["x"].transpose(0, 2).contiguous().transpose(0, 2)
    expected, result = run(by("reference"), {name: x.double() for name, x in inputs.items()}), run(by("numba"), inputs)
    for name in expected:
        assert_close(name, result[name], expected[name], "float32_grad")
