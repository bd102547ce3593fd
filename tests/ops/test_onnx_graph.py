import pytest

from semivim.ops import onnx_graph
from semivim.ops.scan import scan
from tests.ops.conv_cases import bidirectional_conv, conv_inputs, pairs
from tests.ops.scan_cases import bidirectional_inputs, directions_of, mixing
from tests.tolerance import assert_close


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_the_convolution_equals_the_op(tokens):
    inputs = conv_inputs(2, tokens, 6)
    x, *weights = inputs.values()
    graph = onnx_graph.causal_conv(x, pairs(*weights), [False, True])
    for name, a, b in zip(("u", "u_b"), graph, bidirectional_conv(**inputs), strict=True):
        assert_close(name, a, b)


@pytest.mark.parametrize("mixed", (False, True))
@pytest.mark.parametrize("count", (1, 2))
def test_the_scan_equals_the_op(count, mixed):
    inputs = bidirectional_inputs(2, 5, 4, 3)
    directions, mix = directions_of(inputs)[-count:], mixing(2)["mix"][:, :count] if mixed else None
    for arguments in ((inputs["z"], mix, 0.5, True), (None, mix, 1.0, False)):
        assert_close("y", onnx_graph.scan(directions, *arguments), scan(directions, *arguments))
