import importlib
import sys

import pytest
import torch

from semivim.ops import backends, scan_reference
from tests.ops import mamba_stand_in
from tests.ops.scan_cases import bidirectional_inputs, directions_of, forward_of, gradients_of, mixing
from tests.tolerance import assert_close


@pytest.fixture
def scan_cuda(monkeypatch):
    """The adapter on a stand-in for mamba-ssm: arguments and maths around the call, not the CUDA kernel."""
    mamba_stand_in.install(monkeypatch)
    module = importlib.import_module("semivim.ops.scan_cuda")
    yield module
    monkeypatch.undo()
    sys.modules.pop("semivim.ops.scan_cuda", None)


def compare(actual, expected, tolerance):
    for name, b in expected.items():
        a = actual[name]
        assert a.dtype == b.dtype and a.is_contiguous()
        assert_close(name, a, b, tolerance)
    assert len({a.data_ptr() for a in actual.values()}) == len(actual)


@pytest.mark.parametrize("mixed", (False, True), ids=("plain", "mixed"))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize(("b", "l", "d"), ((2, 9, 4), (1, 1, 1)))
def test_both_directions_are_the_references(scan_cuda, b, l, d, dtype, mixed):
    inputs = bidirectional_inputs(b, l, d, 3, getattr(torch, dtype))
    mix = mixing(b)["mix"] if mixed else None
    out, saved = forward_of(scan_cuda, inputs, mix)
    expected, states = forward_of(scan_reference, inputs, mix)
    compare({"out": out}, {"out": expected}, dtype)
    assert saved.shape == (b, scan_cuda.saved_size(l, d, 3, 2))
    grad = torch.randn_like(out)
    tolerance = "float32_grad" if dtype == "float32" else dtype
    actual = gradients_of(scan_cuda, grad, inputs, mix, saved)
    compare(actual, gradients_of(scan_reference, grad, inputs, mix, states), tolerance)


@pytest.mark.parametrize("direction", (0, 1), ids=("forward", "backward"))
@pytest.mark.parametrize("softplus", (False, True))
def test_one_direction_without_gate_is_the_references(scan_cuda, softplus, direction):
    f = directions_of(bidirectional_inputs(2, 9, 5, 3))[direction]
    f = f._replace(delta=f.delta.abs(), delta_bias=f.delta_bias.abs())
    out, saved = scan_cuda.forward([f], None, None, 1.0, softplus)
    expected, states = scan_reference.forward([f], None, None, 1.0, softplus)
    compare({"out": out}, {"out": expected}, "float32")
    grad = torch.randn_like(out)
    (actual,), dz = scan_cuda.backward(grad, [f], None, None, 1.0, softplus, saved)
    (wanted,), _ = scan_reference.backward(grad, [f], None, None, 1.0, softplus, states)
    assert dz is None
    compare(*(dict(zip(f._fields[:6], g[:6], strict=True)) for g in (actual, wanted)), "float32_grad")


def test_mixed_dtypes_keep_their_own(scan_cuda):
    inputs = bidirectional_inputs(1, 5, 4, 3)
    inputs |= {name: inputs[name].bfloat16() for name in ("u", "u_b", "z")}
    out, saved = forward_of(scan_cuda, inputs)
    assert out.dtype == torch.bfloat16
    gradients = gradients_of(scan_cuda, torch.ones_like(out), inputs, None, saved)
    assert {name: g.dtype for name, g in gradients.items()} == {name: x.dtype for name, x in inputs.items()}


def test_reasons(scan_cuda, monkeypatch):
    assert scan_cuda.unavailable(torch.device("cpu")) == "needs a CUDA device, got cpu"
    assert scan_cuda.unavailable(torch.device("cuda", 0)) is None
    monkeypatch.undo()
    sys.modules.pop("semivim.ops.scan_cuda")
    if importlib.util.find_spec("mamba_ssm") is None:
        assert backends.available_backends("cpu")["cuda"].reason == "package mamba_ssm is not installed"
