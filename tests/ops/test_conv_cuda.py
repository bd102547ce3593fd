import importlib
import sys

import pytest
import torch

from semivim.ops import conv_reference
from tests.ops import mamba_stand_in
from tests.ops.test_causal_conv import conv_inputs
from tests.tolerance import assert_close

NAMES = ("u", "u_b", "x", "weight", "bias", "weight_b", "bias_b")


@pytest.fixture
def conv_cuda(monkeypatch):
    """The adapter on a stand-in for causal-conv1d: arguments and maths around the call, not the CUDA kernel."""
    mamba_stand_in.install(monkeypatch)
    yield importlib.import_module("semivim.ops.conv_cuda")
    monkeypatch.undo()
    for name in ("scan_cuda", "conv_cuda"):
        sys.modules.pop(f"semivim.ops.{name}", None)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize(("l", "d", "k"), ((9, 16, 4), (5, 6, 2), (1, 8, 3)))
def test_is_the_reference(conv_cuda, l, d, k, dtype):
    inputs = conv_inputs(2, l, d, k, getattr(torch, dtype))
    inputs["x"] = torch.cat((inputs["x"], inputs["x"]), -1)[..., :d]  # half of a projection's output
    operands = tuple(inputs.values())
    grads = [torch.randn(2, l, d).to(inputs["x"].dtype) for _ in range(2)]
    actual, expected = (
        (*module.bidirectional_conv_forward(*operands), *module.bidirectional_conv_backward(*grads, *operands))
        for module in (conv_cuda, conv_reference)
    )
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        assert a.dtype == b.dtype and a.is_contiguous()
        assert_close(name, a, b, "float32_grad" if dtype == "float32" else dtype)


def test_unsupported_taps_are_named(conv_cuda):
    with pytest.raises(ValueError, match="weight must have 2 to 4 taps for causal-conv1d, got 5"):
        conv_cuda.bidirectional_conv_forward(*conv_inputs(1, 9, 8, 5).values())
