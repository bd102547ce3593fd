import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from semivim.ops import norm_numba, norm_reference
from tests.tolerance import assert_close

EPS = 1e-5


def both_passes(backend, x, weight, grad):
    y, scales = backend.forward(x, weight, EPS)
    return dict(zip(("dx", "dweight"), backend.backward(grad, x, weight, scales), strict=True)) | {
        "y": y,
        "scales": scales,
    }


@pytest.fixture
def poisoned():
    torch.use_deterministic_algorithms(True)  # fills empty tensors with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned")
@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 70)),
    scale=st.sampled_from((0.0, 1e-3, 1.0, 1e3)),
    permuted=st.booleans(),
)
def test_drawn_shapes_strides_and_scales_in_poisoned_memory(shape, scale, permuted):
    x, weight, grad = torch.randn(shape) * scale, torch.randn(shape[2]), torch.randn(shape)
    if permuted:
        x, grad = (t.transpose(0, 2).contiguous().transpose(0, 2) for t in (x, grad))
    expected = both_passes(norm_reference, x.double(), weight.double(), grad.double())
    result = both_passes(norm_numba, x, weight, grad)
    # dx is the difference of two terms, which may be equal but for rounding: of one channel, they always are
    term = (grad * weight * expected["scales"].view(*shape[:2], 1)).abs().max()
    for of in (expected, result):
        of["dx"] = of["dx"] / term
    for name in expected:
        assert_close(name, result[name], expected[name], "float32_grad")


def test_same_bits_twice_and_on_two_threads():
    tensors = torch.randn(5, 40, 72), torch.randn(72), torch.randn(5, 40, 72)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            results.append(both_passes(norm_numba, *tensors))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)
