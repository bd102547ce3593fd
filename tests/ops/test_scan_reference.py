import pytest
import torch

from semivim.ops import scan_reference, selective_scan
from tests.ops.scan_cases import (
    bidirectional_inputs,
    bidirectional_scan,
    directions_of,
    forward_of,
    gradients_of,
    mixing,
    selective_inputs,
)
from tests.tolerance import assert_close


@pytest.mark.parametrize("mixed", (False, True))
def test_bidirectional_gradcheck(mixed):
    inputs = bidirectional_inputs(1, 5, 2, 2, torch.float64)
    mix = mixing(1) if mixed else {}

    def both(*tensors):
        return bidirectional_scan(**dict(zip(inputs, tensors, strict=True)), **mix, backend="reference")

    assert torch.autograd.gradcheck(both, [x.requires_grad_() for x in inputs.values()])


@pytest.mark.parametrize("missing", ((), ("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")), ids=str)
@pytest.mark.parametrize("reverse", (False, True))
def test_selective_gradcheck(missing, reverse):
    inputs = selective_inputs(1, 5, 2, 2, torch.float64)
    for name in missing:
        del inputs[name]

    def scan(*tensors):
        return selective_scan(
            **dict(zip(inputs, tensors, strict=True)), delta_softplus=True, reverse=reverse, backend="reference"
        )

    assert torch.autograd.gradcheck(scan, [x.requires_grad_() for x in inputs.values()])


@pytest.mark.parametrize("l", (1, 66, 150))
def test_backward_is_autograd_of_the_forward(l):
    inputs = {name: x.requires_grad_() for name, x in bidirectional_inputs(2, l, 5, 3, torch.float64).items()}
    mix = mixing(2)["mix"]
    out, saved = forward_of(scan_reference, inputs, mix)
    assert saved.shape == (2, scan_reference.saved_size(l, 5, 3, 2))
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, list(inputs.values()), grad)
    actual = gradients_of(scan_reference, grad, inputs, mix, saved)
    for (name, gradient), b in zip(actual.items(), expected, strict=True):
        assert_close(name, gradient, b, "float64")


@pytest.mark.parametrize("softplus", (False, True))
def test_backward_without_gate_is_autograd_of_the_forward(softplus):
    f = directions_of(bidirectional_inputs(2, 66, 5, 3, torch.float64))[1]
    leaves = [x.requires_grad_() for x in f[:6]]
    out, saved = scan_reference.forward([f], None, None, 1.0, softplus)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaves, grad)
    (gradients,), dz = scan_reference.backward(grad, [f], None, None, 1.0, softplus, saved)
    assert dz is None and gradients.reverse
    for name, a, b in zip(f._fields, gradients[:6], expected, strict=False):
        assert_close(name, a, b, "float64")


def test_float64_is_kept():
    inputs = bidirectional_inputs(1, 9, 4, 3, torch.float64)
    out = bidirectional_scan(**inputs)
    rounded = bidirectional_scan(**{name: x.float() for name, x in inputs.items()})
    assert out.dtype == torch.float64
    assert 1e-9 < (out - rounded).abs().max() < 1e-4


def test_runs_on_any_device():
    assert scan_reference.unavailable(torch.device("cuda")) is None
