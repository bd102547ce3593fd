import torch

from semivim.ops import conv_reference
from tests.ops.conv_cases import bidirectional_conv, both_passes, conv_inputs, pairs
from tests.tolerance import assert_close


def test_gradcheck():
    inputs = conv_inputs(2, 5, 3, dtype=torch.float64)

    def both(*tensors):
        return tuple(bidirectional_conv(**dict(zip(inputs, tensors, strict=True)), backend="reference"))

    assert torch.autograd.gradcheck(both, [x.requires_grad_() for x in inputs.values()])


def test_backward_is_autograd_of_the_forward():
    inputs = {name: x.requires_grad_() for name, x in conv_inputs(2, 12, 5, dtype=torch.float64).items()}
    x, *weights = inputs.values()
    out = conv_reference.forward(x, pairs(*weights), [False, True])
    grads = [torch.randn_like(o) for o in out]
    expected = torch.autograd.grad(out, list(inputs.values()), grads)
    actual = both_passes(conv_reference, inputs, grads)
    for name, gradient in zip(inputs, expected, strict=True):
        assert_close(name, actual[name], gradient, "float64")


def test_no_direction_sees_the_other_side():
    inputs = conv_inputs(1, 9, 3)
    u, u_b = bidirectional_conv(**inputs, backend="reference")
    inputs["x"][:, 5] += 1
    v, v_b = bidirectional_conv(**inputs, backend="reference")
    changed, changed_b = ((a != b).any(2)[0].nonzero().flatten().tolist() for a, b in ((u, v), (u_b, v_b)))
    assert changed == [5, 6, 7, 8]
    assert changed_b == [2, 3, 4, 5]
