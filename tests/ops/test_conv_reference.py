import torch

from semivim.ops import bidirectional_conv, conv_reference
from tests.ops.test_causal_conv import conv_inputs
from tests.tolerance import assert_close


def test_gradcheck():
    inputs = [x.requires_grad_() for x in conv_inputs(2, 5, 3, dtype=torch.float64).values()]
    assert torch.autograd.gradcheck(lambda *x: bidirectional_conv(*x, backend="reference"), inputs)


def test_backward_is_autograd_of_the_forward():
    inputs = [x.requires_grad_() for x in conv_inputs(2, 12, 5, dtype=torch.float64).values()]
    out = conv_reference.bidirectional_conv_forward(*inputs)
    grads = [torch.randn_like(o) for o in out]
    expected = torch.autograd.grad(out, inputs, grads)
    for k, gradient in enumerate(conv_reference.bidirectional_conv_backward(*grads, *inputs)):
        assert_close(str(k), gradient, expected[k], "float64")


def test_no_direction_sees_the_other_side():
    inputs = conv_inputs(1, 9, 3)
    u, u_b = bidirectional_conv(**inputs, backend="reference")
    inputs["x"][:, 5] += 1
    v, v_b = bidirectional_conv(**inputs, backend="reference")
    changed, changed_b = ((a != b).any(2)[0].nonzero().flatten().tolist() for a, b in ((u, v), (u_b, v_b)))
    assert changed == [5, 6, 7, 8]
    assert changed_b == [2, 3, 4, 5]
