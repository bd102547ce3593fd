import pytest
import torch

from semivim.ops import available_backends, bidirectional_scan, scan_reference, scan_triton, selective_scan
from tests.ops.scan_cases import bidirectional_inputs, forward_of, gradients_of, mixing, selective_inputs
from tests.ops.triton_runs import INTERPRETED, compiled, interpreted, on_gpu, run_in_interpreter
from tests.tolerance import assert_close

SELECTIVE = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
WHOLE, SEGMENTED = 1, 1 << 20  # programs that fill the GPU: no launch is cut, or each as far as it goes


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill fresh memory with NaN: an element that is read or returned unwritten shows."""
    torch.use_deterministic_algorithms(INTERPRETED)
    yield
    torch.use_deterministic_algorithms(False)


@compiled
def test_in_the_interpreter():
    scans = "triton and (closed_form or flipped or two_selective or strided or mixed_dtypes or expanded or empty)"
    run_in_interpreter(__file__)
    run_in_interpreter(__file__.replace("scan_triton", "scan"), "-k", scans)


@compiled
def test_reason_without_a_gpu():
    assert scan_triton.unavailable(torch.device("cpu")) == "needs a CUDA device, got cpu"
    assert scan_triton.unavailable(torch.device("cuda", 1)) == ""
    assert available_backends("cpu")["triton"] == "needs a CUDA device, got cpu"


def compare(names, actual, expected, dtype):
    grad = "float32_grad" if dtype == "float32" else dtype
    for name, a, b in zip(names, actual, expected, strict=True):
        if b is None:
            assert a is None
        else:
            assert a.dtype == b.dtype and a.is_contiguous()
            assert_close(name, a, b, dtype if name in ("out", "states") else grad)


def compare_bidirectional(inputs, mixed, dtype="float32"):
    """Output, states and every gradient of the kernels against the reference's."""
    device = inputs["u"].device
    weights = (x.to(device) for x in mixing(inputs["u"].shape[0]).values())
    operands = (*inputs.values(), *(weights if mixed else (None, None)))
    out, states = forward_of(scan_triton, *operands)
    expected = forward_of(scan_reference, *operands)
    compare(("out", "states"), (out, states), expected, dtype)
    grad = torch.randn_like(out)
    # Either backend may have run the forward.
    actual = gradients_of(scan_triton, grad, *operands, expected[1])
    compare(inputs, actual, gradients_of(scan_reference, grad, *operands, states), dtype)


@interpreted
@pytest.mark.parametrize(
    ("b", "l", "d", "n", "chunk", "programs", "mixed"),
    (
        (2, 1, 3, 1, 64, WHOLE, True),
        (1, 19, 34, 5, 8, WHOLE, True),
        (1, 19, 34, 5, 8, SEGMENTED, True),
        (2, 16, 2, 16, 8, SEGMENTED, False),
        (1, 66, 2, 3, 64, WHOLE, False),
    ),
)
def test_bidirectional_scan_is_the_reference(monkeypatch, b, l, d, n, chunk, programs, mixed):
    monkeypatch.setattr(scan_reference, "CHUNK", chunk)
    monkeypatch.setattr(scan_triton, "CHUNK", chunk)
    monkeypatch.setattr(scan_triton, "ENOUGH_PROGRAMS", programs)
    compare_bidirectional(bidirectional_inputs(b, l, d, n), mixed)


@interpreted
@pytest.mark.parametrize("reverse", (False, True), ids=("ahead", "reverse"))
@pytest.mark.parametrize(
    ("bare", "softplus", "programs"),
    ((False, True, SEGMENTED), (True, False, SEGMENTED), (False, False, WHOLE), (True, True, WHOLE)),
)
def test_selective_scan_is_the_reference(monkeypatch, bare, softplus, reverse, programs):
    monkeypatch.setattr(scan_reference, "CHUNK", 8)
    monkeypatch.setattr(scan_triton, "CHUNK", 8)
    monkeypatch.setattr(scan_triton, "ENOUGH_PROGRAMS", programs)
    x = selective_inputs(1, 18, 3, 2, bare=bare)
    if not softplus:
        x["delta"] = x["delta"].abs()
    rows = {name: t.transpose(1, 2) if t.dim() == 3 else t for name, t in x.items()}
    operands = (*(rows.get(name) for name in SELECTIVE), softplus, reverse)
    out, states = scan_triton.selective_scan_forward(*operands)
    compare(("out", "states"), (out, states), scan_reference.selective_scan_forward(*operands), "float32")
    grad = torch.randn_like(out)
    actual = scan_triton.selective_scan_backward(grad, *operands, states)
    compare(SELECTIVE, actual, scan_reference.selective_scan_backward(grad, *operands, states), "float32")


@interpreted
def test_strided_weights_of_the_mix():
    inputs = bidirectional_inputs(2, 9, 4, 3)
    mix = torch.rand(2, 2)
    for psi, nu in ((mix[:, 0], mix[:, 1]), (mix[0, :1].expand(2), mix[1, :1].expand(2))):
        operands = (*inputs.values(), psi, nu)
        out, states = forward_of(scan_triton, *operands)
        assert_close("out", out, forward_of(scan_reference, *operands)[0])
        actual = gradients_of(scan_triton, out, *operands, states)
        compare(inputs, actual, gradients_of(scan_reference, out, *operands, states), "float32")


def test_a_batch_over_the_grids_limit_is_refused():
    with pytest.raises(ValueError, match="at most 65535 images in a batch, got 65536"):
        scan_triton._plan(torch.empty(65_536, 1, 1, device="meta"), 1, 1)


@interpreted
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bfloat16", "float16"))
def test_half_precision_keeps_a_float32_state(dtype):
    compare_bidirectional(bidirectional_inputs(1, 9, 4, 3, dtype), True, str(dtype).removeprefix("torch."))


@interpreted
def test_small_steps_keep_their_relative_precision():
    # softplus(-12) is 6.1e-6: log(1 + exp(x)) in float32 would have 1 % of error.
    x = selective_inputs(1, 4, 2, 2)
    x["delta"] = torch.full_like(x["delta"], -12.0) - x["delta_bias"][:, None]
    x = {name: t for name, t in x.items() if name not in ("D", "z")}
    out = selective_scan(**x, delta_softplus=True, backend="triton")
    truth = selective_scan(**{name: t.double() for name, t in x.items()}, delta_softplus=True, backend="reference")
    assert_close("out", out, truth)


@interpreted
@pytest.mark.parametrize("rate", (-1e-12, -1e4))
def test_extreme_steps_and_rates_stay_finite(rate):
    inputs = bidirectional_inputs(1, 12, 4, 3)
    inputs["delta"][:, ::3] = -200.0
    inputs["delta"][:, 1::3] = 80.0
    inputs["A"] = torch.full_like(inputs["A"], rate)
    compare_bidirectional(inputs, True)


def gpu_operands(b, l, d, dtype):
    """A Vim block's operands at a real size, in the step sizes of its initialisation."""
    inputs = {name: x.cuda() for name, x in bidirectional_inputs(b, l, d, 16, dtype).items()}
    inputs |= {name: inputs[name] - 4 for name in ("delta_bias", "delta_bias_b")}
    return inputs


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
@pytest.mark.parametrize("d", (384, 768, 1536), ids=("tiny", "small", "base"))
@pytest.mark.parametrize(("b", "l"), ((8, 197), (1, 6085)), ids=("224", "1248"))
class TestOnGpu:
    pytestmark = on_gpu

    def test_real_shapes_are_the_reference(self, b, l, d, dtype):
        compare_bidirectional(gpu_operands(b, l, d, getattr(torch, dtype)), True, dtype)

    def test_same_bits_twice(self, b, l, d, dtype):
        inputs = gpu_operands(b, l, d, getattr(torch, dtype))
        a, b = (run_on_gpu(inputs) for _ in range(2))
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("l", (1, 7, 63, 64, 197, 730))
class TestLengthsOnGpu:
    pytestmark = on_gpu

    def test_bidirectional(self, l):
        compare_bidirectional(gpu_operands(2, l, 40, torch.float32), l % 2 == 1)

    @pytest.mark.parametrize("reverse", (False, True), ids=("ahead", "reverse"))
    def test_selective(self, l, reverse):
        inputs = {name: x.cuda().requires_grad_() for name, x in selective_inputs(2, l, 40, 16).items()}

        def gradients(backend):
            out = selective_scan(**inputs, delta_softplus=True, reverse=reverse, backend=backend)
            return out, *torch.autograd.grad(out.square().sum(), list(inputs.values()))

        for name, a, b in zip(("out", *inputs), gradients("triton"), gradients("reference"), strict=True):
            assert_close(name, a, b, "float32" if name == "out" else "float32_grad")


def run_on_gpu(inputs):
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = bidirectional_scan(**leaves, backend="triton")
    gradients = torch.autograd.grad(out.float().square().sum(), list(leaves.values()))
    return {"out": out} | dict(zip(leaves, gradients, strict=True))
