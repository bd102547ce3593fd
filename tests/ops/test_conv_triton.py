import pytest
import torch

from semivim.ops import conv_reference, conv_triton
from tests.ops.scan_cases import DTYPES
from tests.ops.test_causal_conv import conv_inputs
from tests.ops.triton_runs import (
    INTERPRETED,
    assert_deterministic,
    compiled,
    interpreted,
    on_gpu,
    run_in_interpreter,
)
from tests.ops.triton_runs import compiles as compiles
from tests.tolerance import assert_close

NAMES = ("u", "u_b", "x", "weight", "bias", "weight_b", "bias_b")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill fresh memory with NaN: an element that is read or returned unwritten shows."""
    torch.use_deterministic_algorithms(INTERPRETED)
    yield
    torch.use_deterministic_algorithms(False)


def both_passes(module, inputs, grads):
    operands = tuple(inputs.values())
    return (
        *module.bidirectional_conv_forward(*operands),
        *module.bidirectional_conv_backward(*grads, *operands),
    )


def compare(inputs, dtype="float32"):
    grads = [torch.randn_like(inputs["x"]).contiguous() for _ in range(2)]
    actual, expected = (both_passes(module, inputs, grads) for module in (conv_triton, conv_reference))
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        assert a.dtype == b.dtype and a.is_contiguous()
        assert_close(name, a, b, dtype if dtype != "float32" or name in ("u", "u_b") else "float32_grad")


@compiled
def test_in_the_interpreter():
    run_in_interpreter(__file__)


@interpreted
@pytest.mark.parametrize(("b", "l", "d", "k"), ((2, 1, 5, 4), (1, 35, 70, 4), (2, 17, 3, 1), (1, 2, 3, 7)))
def test_is_the_reference(b, l, d, k):
    compare(conv_inputs(b, l, d, k))


@interpreted
@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_half_precision(dtype):
    compare(conv_inputs(1, 9, 6, dtype=DTYPES[dtype]), dtype)


@interpreted
def test_strided_rows_and_large_values():
    inputs = conv_inputs(2, 9, 6)
    inputs["x"] = torch.cat((200 * inputs["x"], torch.full_like(inputs["x"], torch.nan)), -1)[..., :6]
    compare(inputs)


@compiled
@pytest.mark.slow
def test_kernels_compile_without_atomics(compiles):
    inputs = conv_inputs(2, 197, 384, dtype=torch.bfloat16)
    inputs["x"] = torch.zeros(2, 197, 768, dtype=torch.bfloat16)[..., :384]
    both_passes(conv_triton, inputs, [torch.zeros(2, 197, 384)] * 2)
    assert len(compiles) == 2
    assert_deterministic(compiles)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "l", "d"), ((64, 197, 384), (1, 6085, 1536)), ids=("tiny-224", "base-1248"))
class TestOnGpu:
    pytestmark = on_gpu

    def test_real_shapes_are_the_reference(self, b, l, d, dtype):
        compare({name: x.cuda() for name, x in conv_inputs(b, l, d, dtype=DTYPES[dtype]).items()}, dtype)

    def test_same_bits_twice(self, b, l, d, dtype):
        inputs = {name: x.cuda() for name, x in conv_inputs(b, l, d, dtype=DTYPES[dtype]).items()}
        a, b = (both_passes(conv_triton, inputs, [inputs["x"]] * 2) for _ in range(2))
        assert all(map(torch.equal, a, b))
