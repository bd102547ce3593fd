import pytest
import torch

from semivim.ops import bidirectional_scan, scan_reference, selective_scan
from tests.ops.scan_cases import bidirectional_inputs, forward_of, gradients_of, mixing, selective_inputs
from tests.tolerance import assert_close


def channel_last(x):
    return x.transpose(1, 2) if x is not None and x.dim() == 3 else x


@pytest.mark.parametrize("mixed", (False, True))
def test_bidirectional_gradcheck(mixed):
    inputs = [x.requires_grad_() for x in bidirectional_inputs(1, 5, 2, 2, torch.float64).values()]
    mix = mixing(1) if mixed else {}
    assert torch.autograd.gradcheck(lambda *x: bidirectional_scan(*x, **mix, backend="reference"), inputs)


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
def test_bidirectional_backward_is_autograd_of_the_forward(l):
    inputs = [x.requires_grad_() for x in bidirectional_inputs(2, l, 5, 3, torch.float64).values()]
    mix = mixing(2).values()
    out, states = forward_of(scan_reference, *inputs, *mix)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, inputs, grad)
    for k, gradient in enumerate(gradients_of(scan_reference, grad, *inputs, *mix, states)):
        assert_close(str(k), gradient, expected[k], "float64")


@pytest.mark.parametrize("softplus", (False, True))
def test_selective_backward_is_autograd_of_the_forward(softplus):
    x = selective_inputs(2, 66, 5, 3, torch.float64)
    order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    inputs = [channel_last(x[name]).clone().requires_grad_() for name in order]
    out, states = scan_reference.selective_scan_forward(*inputs, softplus, True)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, inputs, grad)
    actual = scan_reference.selective_scan_backward(grad, *inputs, softplus, True, states)
    for name, a, b in zip(order, actual, expected, strict=True):
        assert_close(name, a, b, "float64")


def test_float64_is_kept():
    inputs = bidirectional_inputs(1, 9, 4, 3, torch.float64)
    out = bidirectional_scan(**inputs)
    rounded = bidirectional_scan(**{name: x.float() for name, x in inputs.items()})
    assert out.dtype == torch.float64
    assert 1e-9 < (out - rounded).abs().max() < 1e-4


def test_runs_on_any_device():
    assert scan_reference.unavailable(torch.device("cuda")) == ""
