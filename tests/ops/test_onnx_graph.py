import pytest
import torch

from semivim.ops import bidirectional_conv, bidirectional_scan, onnx_graph
from tests.tolerance import assert_close


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_the_convolution_equals_the_op(tokens):
    x, weight, bias = torch.randn(2, tokens, 12)[..., :6], torch.randn(6, 1, 4), torch.randn(6)
    operands = x, weight, bias, torch.randn(6, 1, 4), torch.randn(6)
    for name, graph, op in zip(
        ("u", "u_b"), onnx_graph.bidirectional_conv(*operands), bidirectional_conv(*operands), strict=True
    ):
        assert_close(name, graph, op)


@pytest.mark.parametrize("mixing", [False, True])
def test_the_scan_equals_the_op(mixing):
    b, l, d, n = 2, 5, 4, 3
    tokens = [torch.randn(b, l, d) for _ in range(4)]
    weights = [torch.randn(b, l, 2 * n) for _ in range(2)]
    rates = [-torch.rand(d, n) for _ in range(2)]
    operands = (*tokens, *weights, torch.randn(b, l, d), *rates, *(torch.randn(d) for _ in range(4)))
    psi, nu = (torch.rand(b), torch.rand(b)) if mixing else (None, None)
    assert_close("y", onnx_graph.bidirectional_scan(*operands, psi, nu), bidirectional_scan(*operands, psi, nu))
