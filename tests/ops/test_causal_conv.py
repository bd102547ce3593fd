import pytest
import torch
import torch.nn.functional as F
from torch import nn

from semivim.ops import bidirectional_conv, use_backend
from tests.ops.scan_cases import DTYPES
from tests.tolerance import assert_close

BACKENDS = ("reference", "numba")
NAMES = ("x", "weight", "bias", "weight_b", "bias_b")


def conv_inputs(b, l, d, k=4, dtype=torch.float32):
    wide = torch.promote_types(dtype, torch.float32)
    inputs = {"x": torch.randn(b, l, d).to(dtype)}
    for end in ("", "_b"):
        inputs["weight" + end], inputs["bias" + end] = torch.randn(d, 1, k).to(wide), torch.randn(d).to(wide)
    return inputs


def by_flips(x, weight, bias, weight_b, bias_b):
    """Conv1d of the sequence and of the flipped sequence, flipped back."""

    def conv(t, w, offset):
        return F.silu(F.conv1d(F.pad(t.transpose(1, 2), [w.shape[2] - 1, 0]), w, offset, groups=w.shape[0])).transpose(
            1, 2
        )

    return conv(x, weight, bias), conv(x.flip(1), weight_b, bias_b).flip(1)


def run(function, inputs, grads=None):
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = function(**leaves)
    grads = [torch.randn(o.shape, generator=torch.Generator().manual_seed(k)).to(o.dtype) for k, o in enumerate(out)]
    gradients = torch.autograd.grad(out, list(leaves.values()), grads)
    return {"u": out[0].detach(), "u_b": out[1].detach()} | dict(zip(leaves, gradients, strict=True))


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


@pytest.mark.parametrize(
    ("name", "cut", "message"),
    (
        ("x", lambda x: x[0], r"x must be \(b, l, d\)"),
        ("weight", lambda x: x[1:], r"weight must be \(d, 1, k\) = \(8, 1, k\), got \(7, 1, 4\)"),
        ("weight_b", lambda x: x[..., 1:], r"weight_b must be \(d, 1, k\) = \(8, 1, 4\), got \(8, 1, 3\)"),
        ("bias", lambda x: x[1:], r"bias must be \(d,\) = \(8,\), got \(7,\)"),
        ("bias_b", lambda x: x[1:], r"bias_b must be"),
    ),
)
def test_wrong_shape_names_the_argument(name, cut, message):
    inputs = conv_inputs(2, 7, 8)
    with pytest.raises(ValueError, match=message):
        bidirectional_conv(**inputs | {name: cut(inputs[name])})


# opcheck reads .grad of tensors that it computed itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    inputs = [x.requires_grad_() for x in conv_inputs(2, 7, 5).values()]
    torch.library.opcheck(torch.ops.semivim.bidirectional_conv.default, (*inputs, backend))


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 1, 4)), nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u, u_b = bidirectional_conv(x, self.weight, self.bias, self.weight, self.bias)
        return u + 2 * u_b


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
