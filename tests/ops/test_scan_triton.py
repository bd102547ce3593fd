import pytest
import torch

from semivim.ops import Direction, available_backends, scan_reference, scan_triton, selective_scan
from semivim.ops.scan_reference import direction_of, operands_of
from tests.ops.scan_cases import bidirectional_inputs, directions_of, mixing, selective_inputs
from tests.ops.triton_runs import INTERPRETED, compiled, interpreted, on_gpu, run_in_interpreter
from tests.tolerance import assert_close

WHOLE, SEGMENTED = 1, 1 << 20  # warps that fill the GPU: no launch is cut, or each as far as it goes


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill fresh memory with NaN: an element that is read or returned unwritten shows."""
    torch.use_deterministic_algorithms(INTERPRETED)
    yield
    torch.use_deterministic_algorithms(False)


@compiled
def test_in_the_interpreter():
    run_in_interpreter(__file__)


@compiled
def test_through_the_op_in_the_interpreter():
    run_in_interpreter(__file__.replace("scan_triton", "scan"), "-k", "triton and (closed_form or expanded or empty)")


@compiled
def test_gradients_in_the_place_of_the_mixer_in_the_interpreter():
    run_in_interpreter(__file__.replace("scan_triton", "mixer"), "-k", "triton and told and 4-torch.float32")


@compiled
def test_reason_without_a_gpu():
    assert scan_triton.unavailable(torch.device("cpu")) == "needs a CUDA device, got cpu"
    assert scan_triton.unavailable(torch.device("cuda", 1)) is None
    assert str(available_backends("cpu")["triton"]) == "needs a CUDA device, got cpu"


def wide(x):
    return None if x is None else x.double()


def in_float64(directions):
    return [direction_of((x.double() for x in operands_of(f)), f.reverse) for f in directions]


def both_passes(backend, grad, directions, z, mix, scale, softplus):
    """Output and, by name, every gradient."""
    out, saved = backend.forward(directions, z, mix, scale, softplus)
    of, dz = backend.backward(grad, directions, z, mix, scale, softplus, saved)
    names = Direction._fields[:6]
    gradients = {f"{name} {k}": x for k, f in enumerate(of) for name, x in zip(names, operands_of(f), strict=True)}
    assert [f.reverse for f in of] == [f.reverse for f in directions]
    return {"out": out, "z": dz} | gradients


def compare(directions, z=None, mix=None, scale=0.5, softplus=True, dtype="float32"):
    """Outputs and gradients of the kernels against the reference in float64; returns them."""
    grad = torch.randn_like(directions[0].u).contiguous()
    actual = both_passes(scan_triton, grad, directions, z, mix, scale, softplus)
    truth = both_passes(scan_reference, grad.double(), in_float64(directions), wide(z), wide(mix), scale, softplus)
    operands = {f"{name} {k}": x for k, f in enumerate(directions) for name, x in f._asdict().items()}
    operands |= {"out": directions[0].u, "z": z}
    for name, b in truth.items():
        if b is None:
            assert actual[name] is None
            continue
        assert actual[name].dtype == operands[name].dtype
        assert actual[name].is_contiguous()
        assert_close(name, actual[name], b, "float32_grad" if dtype == "float32" and name != "out" else dtype)
    return actual


def as_parts(x):
    """The same values as a part of wider rows, NaN around it."""
    room = torch.full((*x.shape[:-1], x.shape[-1] + 6), torch.nan, dtype=x.dtype, device=x.device)
    room[..., 3:-3] = x
    return room[..., 3:-3]


def pair(b, l, d, n, dtype=torch.float32):
    inputs = bidirectional_inputs(b, l, d, n, dtype)
    return directions_of(inputs), inputs["z"]


def cut(monkeypatch, warps, keep=8):
    monkeypatch.setattr(scan_triton, "ENOUGH_WARPS", warps)
    monkeypatch.setattr(scan_triton, "KEEP", keep)


@interpreted
@pytest.mark.parametrize(
    ("b", "l", "d", "n", "warps", "mixed"),
    (
        (2, 1, 3, 1, WHOLE, True),
        (1, 9, 18, 16, WHOLE, False),
        (1, 17, 34, 3, SEGMENTED, True),
        (1, 3, 9, 64, WHOLE, False),
        (1, 9, 3, 32, WHOLE, True),
        (1, 9, 2, 16, SEGMENTED, True),
        (1, 17, 2, 8, WHOLE, False),
    ),
)
def test_pair_is_the_reference(monkeypatch, b, l, d, n, warps, mixed):
    cut(monkeypatch, warps)
    directions, z = pair(b, l, d, n)
    compare(directions, z, **(mixing(b) if mixed else {}))


@interpreted
@pytest.mark.parametrize("reverse", (False, True), ids=("ahead", "reverse"))
@pytest.mark.parametrize(
    ("gated", "softplus", "mixed", "warps", "n"),
    (
        (True, True, False, WHOLE, 16),
        (False, False, True, SEGMENTED, 1),
        (True, False, True, SEGMENTED, 2),
        (False, True, False, WHOLE, 5),
    ),
)
def test_single_direction_is_the_reference(monkeypatch, gated, softplus, mixed, warps, n, reverse):
    cut(monkeypatch, warps)
    (f, _), z = pair(1, 11, 3, n)
    f = f._replace(reverse=reverse)
    if not softplus:
        f = f._replace(delta=f.delta.abs(), delta_bias=f.delta_bias.abs())
    mix = torch.rand(1, 1) if mixed else None
    compare([f], z if gated else None, mix, 2.0, softplus)


@interpreted
def test_order_strides_and_dtypes_of_a_pair_are_free():
    (f, g), z = pair(2, 5, 4, 3)
    g = g._replace(u=g.u.bfloat16(), A=g.A.bfloat16())
    f = f._replace(delta=f.delta.transpose(0, 1).contiguous().transpose(0, 1), D=f.D[:1].expand(4))
    g, f = (x._replace(bc=as_parts(x.bc)) for x in (g, f))
    compare([g, f], as_parts(z), torch.rand(2, 4)[:, ::2], dtype="bfloat16")


@interpreted
@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_half_precision_keeps_a_float32_state(dtype):
    directions, z = pair(1, 5, 4, 3, getattr(torch, dtype))
    compare(directions, z, **mixing(1), dtype=dtype)


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
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # 1 / (1 + inf) is the sigmoid that is meant
def test_extreme_steps_and_rates_stay_finite(rate):
    directions, z = pair(1, 6, 4, 3)
    for f in directions:
        f.delta[:, ::3] = -200.0
        f.delta[:, 1::3] = 80.0
        f.A.fill_(rate)
    compare(directions, z, **mixing(1))


def test_directions_that_the_kernels_cannot_pair_are_refused():
    (f, g), z = pair(1, 2, 3, 4)
    for directions in ([f, f], [g, g], [f, g, f]):
        orders = str([x.reverse for x in directions]).replace("[", r"\[").replace("]", r"\]")
        with pytest.raises(ValueError, match=f"one direction or two opposite ones, got reverse={orders}"):
            scan_triton.forward(directions, z, None, 1.0, True)


def test_size_of_what_is_saved():
    state = 384 * 16
    assert scan_triton.KEEP == 64
    assert scan_triton.saved_size(64, 384, 16, 1) == 0
    assert scan_triton.saved_size(65, 384, 16, 1) == state
    assert scan_triton.saved_size(197, 384, 16, 2) == 2 * 3 * state + 197 * 384


@pytest.mark.parametrize("n", (1, 2, 3, 4, 8, 16, 17, 32, 64))
def test_layout_holds_every_state_once(n):
    layout = scan_triton.layout_of(n)
    assert layout.states >= n
    assert layout.states < 2 * n
    assert layout.states % layout.lanes == 0
    assert layout.lanes % layout.repeats == 0
    assert layout.channels * layout.states == 32 * layout.repeats * (layout.states // layout.lanes)
    assert layout.chunk % (layout.lanes // layout.repeats) == 0


@pytest.mark.parametrize(
    ("tokens", "warps", "segment"), ((200, 1536, 256), (200, 768, 64), (6088, 384, 768), (6088, 24, 64), (8, 1, 64))
)
def test_segments_fill_the_gpu_and_end_at_kept_states(tokens, warps, segment):
    assert scan_triton.segment_of(tokens, warps) == segment


def gpu_pair(b, l, d, n, dtype):
    """A Vim block's operands at a real size, in the step sizes of its initialisation."""
    inputs = {name: x.cuda() for name, x in bidirectional_inputs(b, l, d, n, dtype).items()}
    inputs |= {name: inputs[name] - 4 for name in ("delta_bias", "delta_bias_b")}
    return directions_of(inputs), inputs["z"]


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
@pytest.mark.parametrize(("b", "l"), ((64, 197), (1, 6085)), ids=("224", "1248"))
class TestOnGpu:
    pytestmark = on_gpu

    def test_real_shapes_are_the_reference(self, b, l, dtype):
        directions, z = gpu_pair(b, l, 384, 16, getattr(torch, dtype))
        compare(directions, z, torch.rand(b, 2, device="cuda"), dtype=dtype)

    def test_same_bits_twice_and_in_a_graph(self, b, l, dtype):
        directions, z = gpu_pair(b, l, 384, 16, getattr(torch, dtype))
        operands = directions[0].u, directions, z, torch.rand(b, 2, device="cuda"), 0.5, True
        once, twice = (both_passes(scan_triton, *operands) for _ in range(2))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = both_passes(scan_triton, *operands)
        graph.replay()
        for name in once:
            assert torch.equal(once[name], twice[name]), name
            assert torch.equal(once[name], replayed[name]), name


@pytest.mark.parametrize("l", (1, 7, 63, 64, 197, 730))
class TestLengthsOnGpu:
    pytestmark = on_gpu

    def test_pair_with_one_state(self, l):
        directions, z = gpu_pair(2, l, 40, 1, torch.float32)
        compare(directions, z)

    @pytest.mark.parametrize("reverse", (False, True), ids=("ahead", "reverse"))
    def test_single_direction(self, l, reverse):
        (f, _), z = gpu_pair(2, l, 40, 16, torch.float32)
        compare([f._replace(reverse=reverse)], z, scale=1.0)


@pytest.mark.parametrize("n", (3, 64))
class TestStatesOnGpu:
    pytestmark = on_gpu

    def test_pair(self, n):
        directions, z = gpu_pair(2, 130, 40, n, torch.float32)
        compare(directions, z)
