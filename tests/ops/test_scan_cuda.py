import importlib
import sys

import pytest
import torch

from semivim.ops import backends, scan_reference
from tests.ops import mamba_stand_in
from tests.ops.scan_cases import bidirectional_inputs, forward_of, gradients_of, mixing, selective_inputs
from tests.tolerance import assert_close

SELECTIVE = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


@pytest.fixture
def scan_cuda(monkeypatch):
    """The adapter on a stand-in for mamba-ssm: arguments and maths around the call, not the CUDA kernel."""
    mamba_stand_in.install(monkeypatch)
    module = importlib.import_module("semivim.ops.scan_cuda")
    yield module
    monkeypatch.undo()
    sys.modules.pop("semivim.ops.scan_cuda", None)


def compare(names, actual, expected, tolerance):
    for name, a, b in zip(names, actual, expected, strict=True):
        if b is None:
            assert a is None
        else:
            assert a.dtype == b.dtype and a.is_contiguous()
            assert_close(name, a, b, tolerance)
    pointers = [a.data_ptr() for a in actual if a is not None]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("mixed", (False, True), ids=("plain", "mixed"))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize(("b", "l", "d"), ((2, 9, 4), (1, 1, 1)))
def test_bidirectional_scan_is_the_reference(scan_cuda, b, l, d, dtype, mixed):
    inputs = bidirectional_inputs(b, l, d, 3, getattr(torch, dtype))
    operands = (*inputs.values(), *(mixing(b).values() if mixed else (None, None)))
    out, states = forward_of(scan_cuda, *operands)
    expected, stored = forward_of(scan_reference, *operands)
    compare(("out",), (out,), (expected,), dtype)
    assert states.shape == stored.shape and states.isnan().all()
    grad = torch.randn_like(out)
    tolerance = "float32_grad" if dtype == "float32" else dtype
    actual = gradients_of(scan_cuda, grad, *operands, states)
    compare(inputs, actual, gradients_of(scan_reference, grad, *operands, stored), tolerance)


@pytest.mark.parametrize("reverse", (False, True), ids=("ahead", "reverse"))
@pytest.mark.parametrize("bare", (False, True), ids=("gated", "bare"))
def test_selective_scan_is_the_reference(scan_cuda, bare, reverse):
    x = selective_inputs(2, 9, 5, 3, bare=bare)
    rows = {name: t.transpose(1, 2) if t.dim() == 3 else t for name, t in x.items()}
    operands = (*(rows.get(name) for name in SELECTIVE), not bare, reverse)
    out, states = scan_cuda.selective_scan_forward(*operands)
    expected, stored = scan_reference.selective_scan_forward(*operands)
    compare(("out",), (out,), (expected,), "float32")
    grad = torch.randn_like(out)
    actual = scan_cuda.selective_scan_backward(grad, *operands, states)
    compare(SELECTIVE, actual, scan_reference.selective_scan_backward(grad, *operands, stored), "float32_grad")


def test_mixed_dtypes_keep_their_own(scan_cuda):
    inputs = bidirectional_inputs(1, 5, 4, 3)
    inputs |= {name: inputs[name].bfloat16() for name in ("u", "u_b", "z")}
    operands = (*inputs.values(), None, None)
    out, states = forward_of(scan_cuda, *operands)
    assert out.dtype == torch.bfloat16
    gradients = gradients_of(scan_cuda, torch.ones_like(out), *operands, states)
    assert [g.dtype for g in gradients] == [x.dtype for x in inputs.values()]


def test_reasons(scan_cuda, monkeypatch):
    assert scan_cuda.unavailable(torch.device("cpu")) == "needs a CUDA device, got cpu"
    assert scan_cuda.unavailable(torch.device("cuda", 0)) == ""
    monkeypatch.undo()
    sys.modules.pop("semivim.ops.scan_cuda")
    if importlib.util.find_spec("mamba_ssm") is None:
        assert backends.available_backends("cpu")["cuda"] == "package mamba_ssm is not installed"
