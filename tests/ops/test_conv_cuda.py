import importlib
import sys

import pytest
import torch

from semivim.ops import conv_reference
from tests.ops import mamba_stand_in
from tests.ops.conv_cases import both_passes, conv_inputs, pairs
from tests.tolerance import assert_close


@pytest.fixture
def conv_cuda(monkeypatch):
    """The adapter on a stand-in for causal-conv1d: arguments and maths around the call, not the CUDA kernel."""
    mamba_stand_in.install(monkeypatch)
    yield importlib.import_module("semivim.ops.conv_cuda")
    monkeypatch.undo()
    sys.modules.pop("semivim.ops.conv_cuda", None)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize(("l", "d", "k"), ((9, 16, 4), (5, 6, 2), (1, 8, 3)))
def test_is_the_reference(conv_cuda, l, d, k, dtype):
    inputs = conv_inputs(2, l, d, k, getattr(torch, dtype))
    inputs["x"] = torch.cat((inputs["x"], inputs["x"]), -1)[..., :d]  # half of a projection's output
    grads = [torch.randn(2, l, d).to(inputs["x"].dtype) for _ in range(2)]
    actual, expected = (both_passes(module, inputs, grads) for module in (conv_cuda, conv_reference))
    for name, b in expected.items():
        a = actual[name]
        assert a.dtype == b.dtype and a.is_contiguous()
        assert_close(name, a, b, "float32_grad" if dtype == "float32" else dtype)


def test_unsupported_taps_are_named(conv_cuda):
    with pytest.raises(ValueError, match="weight must have 2 to 4 taps for causal-conv1d, got 5"):
        x, *weights = conv_inputs(1, 9, 8, 5).values()
        conv_cuda.forward(x, pairs(*weights), [False, True])
