import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from semivim.ops import use_backend
from semivim.ops.causal_conv import causal_conv
from tests.ops.conv_cases import bidirectional_conv, conv_inputs, run
from tests.ops.scan_cases import DTYPES
from tests.tolerance import assert_close

BACKENDS = ("reference", "numba")
NAMES = ("x", "weight", "bias", "weight_b", "bias_b")


def by_flips(x, weight, bias, weight_b, bias_b):
    """Conv1d of the sequence and of the flipped sequence, flipped back."""

    def conv(t, w, offset):
        return F.silu(F.conv1d(F.pad(t.transpose(1, 2), [w.shape[2] - 1, 0]), w, offset, groups=w.shape[0])).transpose(
            1, 2
        )

    return conv(x, weight, bias), conv(x.flip(1), weight_b, bias_b).flip(1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("l", (1, 2, 3, 7, 64, 197))
def test_is_two_convolutions_with_flips(backend, dtype, l):
    inputs = conv_inputs(2, l, 24, dtype=DTYPES[dtype])
    actual = run(lambda **x: bidirectional_conv(**x, backend=backend), inputs)
    double = {name: x.double() for name, x in inputs.items()}
    expected = run(by_flips, double)
    for name in expected:
        tolerance = "float32_grad" if dtype == "float32" and name in NAMES else dtype
        assert_close(name, actual[name], expected[name], tolerance)
        assert actual[name].dtype == inputs.get(name, inputs["x"]).dtype
    assert actual["u"].is_contiguous()
    assert actual["u_b"].is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", (1, 2, 3, 5, 9))
def test_any_number_of_taps(backend, k):
    inputs = conv_inputs(1, 11, 18, k)
    actual = run(lambda **x: bidirectional_conv(**x, backend=backend), inputs)
    for name, x in run(by_flips, {name: x.double() for name, x in inputs.items()}).items():
        assert_close(name, actual[name], x, "float32_grad")


@pytest.mark.parametrize("backend", BACKENDS)
def test_part_of_a_projection_equals_a_dense_input(backend):
    inputs = conv_inputs(2, 9, 8)
    room = torch.full((2, 9, 16), float("nan"))
    strided = inputs | {"x": room[..., 8:].copy_(inputs["x"])}
    a, b = (run(lambda **x: bidirectional_conv(**x, backend=backend), i) for i in (inputs, strided))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    result = run(lambda **x: bidirectional_conv(**x, backend=backend), conv_inputs(0, 7, 8))
    assert result["u"].shape == (0, 7, 8)
    assert torch.equal(result["weight"], torch.zeros(8, 1, 4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reverse", (False, True))
def test_one_direction_is_one_of_both(backend, reverse):
    inputs = conv_inputs(2, 9, 18)
    end = "_b" if reverse else ""
    one = {name: inputs[name] for name in ("x", "weight" + end, "bias" + end)}
    leaves = [x.requires_grad_() for x in one.values()]
    (u,) = causal_conv(leaves[0], [(leaves[1], leaves[2])], [reverse], backend)
    expected = bidirectional_conv(**inputs, backend=backend)[int(reverse)]
    assert torch.equal(u, expected)
    grad = torch.randn_like(u)
    for a, b in zip(torch.autograd.grad(u, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_order_of_two_directions_is_free(backend):
    x, *weights = conv_inputs(2, 9, 18).values()
    forward, backward = (weights[0], weights[1]), (weights[2], weights[3])
    u, u_b = causal_conv(x, [forward, backward], [False, True], backend)
    v_b, v = causal_conv(x, [backward, forward], [True, False], backend)
    assert torch.equal(u, v) and torch.equal(u_b, v_b)


@pytest.mark.parametrize(
    ("name", "cut", "message"),
    (
        ("x", lambda x: x[0], r"x must be \(b, l, d\)"),
        ("weight", lambda x: x[1:], r"weights\[0\]\[0\] must be \(d, 1, k\) = \(8, 1, 4\), got \(7, 1, 4\)"),
        ("weight_b", lambda x: x[..., 1:], r"weights\[1\]\[0\] must be \(d, 1, k\) = \(8, 1, 4\), got \(8, 1, 3\)"),
        ("bias", lambda x: x[1:], r"weights\[0\]\[1\] must be \(d,\) = \(8,\), got \(7,\)"),
        ("bias_b", lambda x: x[1:], r"weights\[1\]\[1\] must be"),
    ),
)
def test_wrong_shape_names_the_argument(name, cut, message):
    inputs = conv_inputs(2, 7, 8)
    with pytest.raises(ValueError, match=message):
        bidirectional_conv(**inputs | {name: cut(inputs[name])})


@pytest.mark.parametrize("reverse", ([], [False], [True, True]), ids=str)
def test_two_directions_are_opposite(reverse):
    x, *weights = conv_inputs(2, 7, 8).values()
    with pytest.raises(ValueError, match=r"weights must be one pair .* got 2 with reverse"):
        causal_conv(x, [(weights[0], weights[1]), (weights[2], weights[3])], reverse)


def test_flops_are_counted_in_torchs_way():
    with FlopCounterMode(display=False) as counter:
        bidirectional_conv(**conv_inputs(2, 7, 8, 3))
    assert counter.get_total_flops() == 2 * 2 * 3 * 2 * 7 * 8


# opcheck reads .grad of tensors that it computed itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    x, *weights = (x.requires_grad_() for x in conv_inputs(2, 7, 5).values())
    torch.library.opcheck(torch.ops.semivim.causal_conv.default, (x, weights, [False, True], backend))
    torch.library.opcheck(torch.ops.semivim.causal_conv.default, (x, weights[:2], [True], backend))


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 1, 4)), nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = causal_conv(x, [(self.weight, self.bias), (self.weight, self.bias)], [False, True])
        return outputs[0] + 2 * outputs[1]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_compiles_exports_scripts_and_traces():
    module, x = Conv(), torch.randn(2, 9, 6)
    graph = torch.fx.symbolic_trace(module)
    exported = torch.export.export(module, (x,), dynamic_shapes={"x": {1: torch.export.Dim("l", min=2)}}).module()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for transformed in (torch.jit.script(module), graph, torch.jit.script(graph), exported, compiled):
        assert torch.equal(transformed(x), module(x))
    assert torch.equal(exported(x[:, :5]), module(x[:, :5]))


def test_named_backend_and_block():
    inputs = conv_inputs(1, 5, 4)
    with pytest.raises(ValueError, match="got 'fast'"):
        bidirectional_conv(**inputs, backend="fast")
    with use_backend("reference"):
        assert bidirectional_conv(**{name: x.double() for name, x in inputs.items()})[0].dtype == torch.float64
