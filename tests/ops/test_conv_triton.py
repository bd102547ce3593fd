import pytest
import torch

from semivim.ops import conv_reference, conv_triton
from tests.ops.conv_cases import both_passes, conv_inputs
from tests.ops.scan_cases import DTYPES
from tests.ops.triton_runs import INTERPRETED, compiled, interpreted, on_gpu, run_in_interpreter
from tests.tolerance import assert_close


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill fresh memory with NaN: an element that is read or returned unwritten shows."""
    torch.use_deterministic_algorithms(INTERPRETED)
    yield
    torch.use_deterministic_algorithms(False)


def compare(inputs, dtype="float32"):
    """Outputs and gradients of the kernels against the reference in float64; returns them."""
    grads = [torch.randn_like(inputs["x"]).contiguous() for _ in range(2)]
    actual = both_passes(conv_triton, inputs, grads)
    truth = both_passes(
        conv_reference, {name: x.double() for name, x in inputs.items()}, [grad.double() for grad in grads]
    )
    for name, b in truth.items():
        assert actual[name].dtype == inputs.get(name, inputs["x"]).dtype
        assert actual[name].is_contiguous()
        assert_close(
            name, actual[name], b, "float32_grad" if dtype == "float32" and name not in ("u", "u_b") else dtype
        )
    return actual


@compiled
def test_in_the_interpreter():
    run_in_interpreter(__file__)


@interpreted
@pytest.mark.parametrize(
    ("b", "l", "d", "k", "segment"), ((2, 1, 5, 4, 32), (1, 35, 70, 4, 16), (2, 17, 3, 1, 32), (1, 9, 3, 7, 8))
)
def test_is_the_reference(monkeypatch, b, l, d, k, segment):
    monkeypatch.setattr(conv_triton, "SEGMENT", segment)
    compare(conv_inputs(b, l, d, k))


@interpreted
@pytest.mark.parametrize("reverse", ([False], [True], [True, False]), ids=str)
def test_single_directions_and_the_other_order(monkeypatch, reverse):
    monkeypatch.setattr(conv_triton, "SEGMENT", 8)
    x = torch.randn(2, 11, 5)
    weights = [(torch.randn(5, 1, 4), torch.randn(5)) for _ in reverse]
    grads = [torch.randn(2, 11, 5) for _ in reverse]
    for a, b in zip(conv_triton.forward(x, weights, reverse), conv_reference.forward(x, weights, reverse), strict=True):
        assert_close("u", a, b)
    (dx, of), (dx_true, of_true) = (m.backward(grads, x, weights, reverse) for m in (conv_triton, conv_reference))
    assert_close("x", dx, dx_true, "float32_grad")
    for pair, pair_true in zip(of, of_true, strict=True):
        for name, a, b in zip(("weight", "bias"), pair, pair_true, strict=True):
            assert_close(name, a, b, "float32_grad")


@interpreted
def test_dtypes_of_directions_may_differ():
    inputs = conv_inputs(1, 9, 6)
    inputs |= {name: inputs[name].bfloat16() for name in ("weight_b", "bias")}
    compare(inputs, "bfloat16")


@interpreted
@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_half_precision(dtype):
    compare(conv_inputs(1, 9, 6, dtype=DTYPES[dtype]), dtype)


@interpreted
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # 1 / (1 + inf) is the sigmoid that is meant
def test_strided_rows_and_large_values():
    inputs = conv_inputs(2, 9, 6)
    inputs["x"] = torch.cat((200 * inputs["x"], torch.full_like(inputs["x"], torch.nan)), -1)[..., :6]
    compare(inputs)


@pytest.mark.parametrize("reverse", ([False, False], [True, True], [False, True, False]), ids=str)
def test_directions_that_the_kernels_cannot_pair_are_refused(reverse):
    weights = [(torch.randn(3, 1, 4), torch.randn(3))] * len(reverse)
    with pytest.raises(ValueError, match="one direction or two opposite ones, got reverse="):
        conv_triton.forward(torch.randn(1, 2, 3), weights, reverse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "l", "d"), ((64, 197, 384), (1, 6085, 384)), ids=("224", "1248"))
class TestOnGpu:
    pytestmark = on_gpu

    def test_real_shapes_are_the_reference_and_the_same_bits_twice(self, b, l, d, dtype):
        inputs = {name: x.cuda() for name, x in conv_inputs(b, l, d, dtype=DTYPES[dtype]).items()}
        compare(inputs, dtype)
        once, twice = (both_passes(conv_triton, inputs, [inputs["x"]] * 2) for _ in range(2))
        assert all(torch.equal(once[name], twice[name]) for name in once)
