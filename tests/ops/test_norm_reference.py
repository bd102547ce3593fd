import pytest
import torch
import torch.nn.functional as F

from semivim.ops import norm_reference
from tests.tolerance import assert_close


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_both_passes_are_torchs(dtype):
    exact = {torch.float64: "float64", torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
    x, weight, grad = (torch.randn(shape).to(dtype) for shape in ((3, 7, 20), (20,), (3, 7, 20)))
    of_torch = [t.double().requires_grad_() for t in (x, weight)]
    expected = F.rms_norm(of_torch[0], (20,), of_torch[1], 1e-5)
    y, scales = norm_reference.forward(x, weight, 1e-5)
    assert y.dtype == dtype and scales.shape == (21,)
    assert_close("y", y, expected, exact)
    gradients = norm_reference.backward(grad, x, weight, scales)
    for name, ours, theirs in zip(
        ("dx", "dweight"), gradients, torch.autograd.grad(expected, of_torch, grad.double()), strict=True
    ):
        assert ours.dtype == dtype
        assert_close(name, ours, theirs, exact)
