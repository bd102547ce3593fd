import numpy as np
import pytest
import torch

from semivim.ops import conv_kernels_numba as kernels
from semivim.ops import conv_numba, conv_reference


@pytest.mark.parametrize("tokens", [1, 3, kernels.STEPS - 3, kernels.STEPS, kernels.STEPS + 1, 2 * kernels.STEPS + 5])
@pytest.mark.parametrize("reverse", [[False], [True], [False, True], [True, False]])
def test_steps_of_a_vector_continue_where_it_stopped(tokens, reverse):
    """Lengths around the border between two runs of steps, channels around that between two tasks."""
    channels = kernels.BLOCK + 5
    x = torch.randn(2, tokens, channels)
    weights = [(torch.randn(channels, 1, 4), torch.randn(channels)) for _ in reverse]
    grads = [torch.randn_like(x) for _ in reverse]
    dx, gradients = conv_numba.backward(grads, x, weights, reverse)
    expected_dx, expected = conv_reference.backward(grads, x, weights, reverse)
    pairs = [(dx, expected_dx), *zip(sum(gradients, ()), sum(expected, ()), strict=True)]
    pairs += zip(conv_numba.forward(x, weights, reverse), conv_reference.forward(x, weights, reverse), strict=True)
    for actual, wanted in pairs:
        np.testing.assert_allclose(actual, wanted, rtol=2e-5, atol=2e-5 * max(1.0, wanted.abs().max().item()))
