import math
import shutil

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from semivim.ops import Direction, scan_kernels_numba, scan_reference, selective_scan, use_backend
from semivim.ops.scan import scan
from tests.ops.scan_cases import (
    BACKENDS,
    BIDIRECTIONAL,
    DTYPES,
    LENGTHS,
    bidirectional_inputs,
    bidirectional_scan,
    directions_of,
    expected_bidirectional,
    expected_selective,
    in_float64,
    mixing,
    run,
    selective_inputs,
)
from tests.tolerance import assert_close

no_jit_warning = pytest.mark.filterwarnings("ignore:.*torch.jit")


def compare(actual, expected, dtype="float32"):
    for name in expected:
        assert_close(
            name, actual[name], expected[name], "float32_grad" if dtype == "float32" and name != "out" else dtype
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("l", LENGTHS)
def test_bidirectional_scan_is_the_float64_one(backend, dtype, l):
    mixed = l in (7, 197)
    inputs = bidirectional_inputs(2, l, 24, 16, DTYPES[dtype])
    actual = run(bidirectional_scan, inputs, backend=backend, **(mixing(2) if mixed else {}))
    compare(actual, expected_bidirectional(l, DTYPES[dtype], mixed), dtype)
    assert all(actual[name].dtype == x.dtype for name, x in inputs.items())
    assert actual["out"].dtype == DTYPES[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bare", (False, True), ids=("gated", "bare"))
@pytest.mark.parametrize("reverse", (False, True), ids=("ahead", "reverse"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("l", LENGTHS)
def test_selective_scan_is_the_float64_one(backend, bare, reverse, dtype, l):
    if dtype != "float32" and l > 100:
        l = 65 if reverse else 128  # half precision at every length is the bidirectional scan's
    inputs = selective_inputs(1, l, 20, 16, DTYPES[dtype], bare)
    actual = run(selective_scan, inputs, backend=backend, delta_softplus=not bare, reverse=reverse)
    compare(actual, expected_selective(l, DTYPES[dtype], bare, reverse), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", (1, 4, 5, 16, 64))
def test_any_number_of_states(backend, n):
    inputs = bidirectional_inputs(1, 70, 18, n, seed=n)
    compare(run(bidirectional_scan, inputs, backend=backend), in_float64(bidirectional_scan, inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_state_in_closed_form(backend):
    # Constant input and step: h_t = b (1 + a + ... + a^t), a = exp(-dt).
    l, dt = 40, 0.25
    ones = torch.ones(1, 1, l)
    out = selective_scan(ones, dt * ones, -torch.ones(1, 1), ones, 2 * ones, backend=backend)
    decay = math.exp(-dt)
    expected = torch.tensor([2 * dt * (1 - decay ** (t + 1)) / (1 - decay) for t in range(l)])
    assert_close("out", out[0, 0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reverse_is_the_flipped_scan(backend):
    inputs = selective_inputs(2, 33, 5, 3)
    flipped = {name: x.flip(-1) if x.dim() == 3 else x for name, x in inputs.items()}
    a = selective_scan(**inputs, delta_softplus=True, reverse=True, backend=backend)
    b = selective_scan(**flipped, delta_softplus=True, backend=backend).flip(-1)
    assert_close("out", a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_directions_are_two_selective_scans(backend):
    x = bidirectional_inputs(2, 30, 12, 4, seed=3)
    mix = mixing(2)
    s, skip = [], []
    for end, reverse in (("", False), ("_b", True)):
        B, C = x["bc" + end].transpose(1, 2).chunk(2, 1)
        scan = selective_scan(
            x["u" + end].transpose(1, 2),
            x["delta" + end].transpose(1, 2),
            x["A" + end],
            B,
            C,
            delta_bias=x["delta_bias" + end],
            delta_softplus=True,
            reverse=reverse,
            backend=backend,
        )
        s.append(scan.transpose(1, 2))
        skip.append(x["D" + end] * x["u" + end])
    gated = nn.functional.silu(x["z"]) * (sum(s) + sum(skip))
    weight = mix["mix"][:, :, None, None]
    assert_close("plain", bidirectional_scan(**x, backend=backend), gated / 2)
    mixed = (gated + weight[:, 0] * s[0] + weight[:, 1] * s[1]) / 2  # Semi-ViM Eq. (15), (16)
    assert_close("mixed", bidirectional_scan(**x, **mix, backend=backend), mixed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_equal_dense_ones(backend):
    dense = bidirectional_inputs(2, 21, 8, 4)
    strided = {}
    for name, x in dense.items():
        room = torch.full((*x.shape[:-1], 3 * x.shape[-1] + 1), float("nan"))
        strided[name] = (
            room[..., 1::3].copy_(x) if name in ("u", "delta_b") else room[..., 2 : 2 + x.shape[-1]].copy_(x)
        )
    strided["z"] = dense["z"].transpose(0, 1).contiguous().transpose(0, 1)
    a, b = run(bidirectional_scan, dense, backend=backend), run(bidirectional_scan, strided, backend=backend)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_gradient(backend):
    inputs = {name: x.requires_grad_() for name, x in bidirectional_inputs(2, 9, 8, 4).items()}
    out = bidirectional_scan(**inputs, backend=backend)
    a = torch.autograd.grad(out.sum(), list(inputs.values()), retain_graph=True)
    b = torch.autograd.grad(out, list(inputs.values()), torch.ones_like(out))
    assert all(map(torch.equal, a, b))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    for function, inputs in (
        (bidirectional_scan, bidirectional_inputs(0, 7, 8, 4)),
        (selective_scan, selective_inputs(0, 7, 8, 4)),
    ):
        result = run(function, inputs, backend=backend)
        assert result["out"].shape == inputs["u"].shape
        assert torch.equal(result["A"], torch.zeros_like(inputs["A"]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes_keep_their_own(backend):
    inputs = bidirectional_inputs(1, 20, 8, 4)
    inputs |= {name: inputs[name].bfloat16() for name in ("u", "u_b", "bc", "z")}
    result = run(bidirectional_scan, inputs, backend=backend)
    assert result["out"].dtype == torch.bfloat16
    assert all(result[name].dtype == x.dtype for name, x in inputs.items())
    compare(result, in_float64(bidirectional_scan, inputs), "bfloat16")


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_weights_are_widened_before_anything_else(backend):
    inputs = bidirectional_inputs(1, 30, 8, 4)
    inputs |= {name: inputs[name].bfloat16() for name in ("A", "A_b", "D", "delta_bias")}
    with torch.no_grad():
        out = bidirectional_scan(**inputs, backend=backend)
        truth = bidirectional_scan(**{name: x.double() for name, x in inputs.items()}, backend="reference")
    assert_close("out", out, truth)


def test_state_is_float32_under_bfloat16():
    # 400 equal increments: a bfloat16 state stops growing at 256.
    l = 400
    ones = torch.ones(1, 1, l, dtype=torch.bfloat16)
    out = selective_scan(ones, ones, torch.zeros(1, 1), ones, ones)
    assert out.dtype == torch.bfloat16
    assert out[0, 0, -1] == 400


def called(name):
    """What an error calls an operand of `bidirectional_inputs`."""
    return name if name in ("z", "mix") else rf"directions\[{int(name.endswith('_b'))}\].{name.removesuffix('_b')}"


@pytest.mark.parametrize("name", BIDIRECTIONAL[1:])
def test_wrong_shape_names_the_operand(name):
    inputs = bidirectional_inputs(2, 7, 8, 4)
    inputs[name] = inputs[name][1:] if name in ("A", "A_b") else inputs[name][..., 1:]
    # The first direction's A says what d is.
    wrong = "directions\\[0\\].A" if name == "A" else called(name)
    with pytest.raises(ValueError, match=rf"^{wrong} must be \(.*\) = \(.*\), got \(.*\)$"):
        bidirectional_scan(**inputs)


@pytest.mark.parametrize(
    ("name", "message"),
    (
        ("delta", r"delta must be \(b, d, l\) = \(2, 8, 7\), got \(2, 8, 6\)"),
        ("B", r"B must be \(b, n, l\) = \(2, 4, 7\), got \(2, 4, 6\)"),
        ("C", r"C must be \(b, n, l\)"),
        ("D", r"D must be \(d\) = \(8,\), got \(7,\)"),
        ("z", r"z must be \(b, d, l\)"),
        ("delta_bias", r"delta_bias must be \(d\)"),
    ),
)
def test_wrong_shape_names_the_argument_of_the_selective_scan(name, message):
    inputs = selective_inputs(2, 7, 8, 4)
    inputs[name] = inputs[name][..., 1:]
    with pytest.raises(ValueError, match=message):
        selective_scan(**inputs)


def test_mix_has_a_weight_for_each_image_and_direction():
    inputs = bidirectional_inputs(2, 7, 8, 4)
    with pytest.raises(ValueError, match=r"^mix must be \(b, K\) = \(2, 2\), got \(2,\)"):
        bidirectional_scan(**inputs, mix=torch.ones(2))
    with pytest.raises(ValueError, match=r"^directions must hold one or more of 6 tensors each, got 0 tensors"):
        scan([])


@pytest.mark.parametrize("name", ("B", "C"))
@pytest.mark.parametrize("shape", ((8, 4), (2, 1, 4, 7)), ids=("constant", "grouped"))
def test_forms_of_mamba_ssm_that_are_not_supported_say_so(name, shape):
    inputs = selective_inputs(2, 7, 8, 4) | {name: torch.ones(shape)}
    with pytest.raises(ValueError, match=rf"^{name} must be \(b, n, l\), .*constant \(d, n\) and grouped"):
        selective_scan(**inputs)


@pytest.mark.parametrize("reverse", (False, True), ids=("forward", "backward"))
@pytest.mark.parametrize("softplus", (False, True))
def test_last_state_is_what_a_unit_readout_reads(reverse, softplus):
    x = selective_inputs(2, 130, 5, 3)
    if not softplus:
        x["delta"] = x["delta"].abs()
        del x["delta_bias"]
    options = {"delta_softplus": softplus, "reverse": reverse}
    out, state = selective_scan(**x, **options, return_last_state=True)
    assert torch.equal(out, selective_scan(**x, **options))
    assert state.shape == (2, 5, 3) and state.dtype == torch.float32
    for j, unit in enumerate(torch.eye(3)):
        one = {name: t for name, t in x.items() if name not in ("D", "z")} | {
            "C": unit[None, :, None].expand(2, 3, 130)
        }
        assert_close("state", state[..., j], selective_scan(**one, **options)[..., 0 if reverse else -1])


@pytest.mark.parametrize("backend", ("reference", "numba"))
@pytest.mark.parametrize("reverses", ((False, False, True), (True, False), (True,)), ids=str)
@pytest.mark.parametrize("gated", (False, True), ids=("bare", "gated"))
def test_any_number_of_directions_is_the_sum_of_their_scans(backend, reverses, gated):
    many = [
        directions_of(bidirectional_inputs(2, 70, 9, 3, seed=k))[0]._replace(reverse=back)
        for k, back in enumerate(reverses)
    ]
    z = torch.randn(2, 70, 9) if gated else None
    mix = torch.rand(2, len(many))
    leaves = [x.requires_grad_() for f in many for x in f[:6]] + ([z.requires_grad_()] if gated else [])
    bare = [f._replace(D=torch.zeros(9)) for f in many]
    s = [scan([f], backend="reference") for f in bare]
    total = sum(s_k + f.D * f.u for s_k, f in zip(s, many, strict=True))
    expected = (total if z is None else nn.functional.silu(z) * total) + sum(
        mix[:, k, None, None] * s_k for k, s_k in enumerate(s)
    )
    out = scan(many, z, mix, 0.25, backend=backend)
    assert_close("out", out, 0.25 * expected)
    grad = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(0.25 * expected, leaves, grad), strict=True
    ):
        assert_close("gradient", a, b, "float32_grad")


def test_flops_are_counted_in_torchs_way():
    inputs = {name: x.requires_grad_() for name, x in bidirectional_inputs(2, 7, 8, 4).items()}
    with FlopCounterMode(display=False) as counter:
        out = bidirectional_scan(**inputs)
    assert counter.get_total_flops() == 2 * 9 * 2 * 7 * 8 * 4
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 9 * 2 * 7 * 8 * 4


def test_a_backward_refuses_what_another_backend_saved():
    inputs = bidirectional_inputs(1, 7, 8, 4)
    operands = [x for f in directions_of(inputs) for x in f[:6]]
    with pytest.raises(ValueError, match="must get 64 saved values an image, got 63"):
        torch.ops.semivim.scan_backward(
            inputs["z"], operands, [0, 1], inputs["z"], None, 0.5, True, torch.ones(1, 63), "numba"
        )


def test_no_token_and_integers_are_errors():
    inputs = selective_inputs(2, 7, 8, 4)
    with pytest.raises(ValueError, match="at least one token"):
        selective_scan(**{name: x[..., :0] if x.dim() == 3 else x for name, x in inputs.items()})
    with pytest.raises(ValueError, match="u must have a real floating dtype, got torch.int64"):
        selective_scan(**inputs | {"u": inputs["u"].long()})


@pytest.mark.parametrize("name", ("z", "A", "A_b", "D_b", "mix"))
def test_an_operand_elsewhere_or_of_another_kind_is_named(name):
    inputs = bidirectional_inputs(2, 7, 8, 4) | mixing(2)
    with pytest.raises(ValueError, match=f"^{called(name)} must be on cpu as u is, got meta"):
        bidirectional_scan(**inputs | {name: inputs[name].to("meta")})
    with pytest.raises(ValueError, match=f"^{called(name)} must have a real floating dtype, got torch.complex64"):
        bidirectional_scan(**inputs | {name: inputs[name].to(torch.complex64)})


# opcheck reads .grad of tensors that it computed itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transposed", (False, True))
def test_opcheck(backend, transposed):
    inputs = {name: x.requires_grad_() for name, x in bidirectional_inputs(1, 66, 5, 3).items()}
    for name in ("u", "u_b", "delta", "bc", "z") if transposed else ():
        inputs[name] = inputs[name].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    directions = directions_of(inputs)
    operands = [x for f in directions for x in f[:6]]
    op = torch.ops.semivim.scan.default
    torch.library.opcheck(op, (operands, [0, 1], inputs["z"], mixing(1)["mix"], 0.5, True, backend))
    torch.library.opcheck(op, (operands[6:], [True], None, None, 1.0, False, backend))


def test_fake_and_real_outputs_agree_on_meta():
    inputs = {name: x.to("meta") for name, x in bidirectional_inputs(2, 70, 8, 4).items()}
    out = bidirectional_scan(**inputs)
    assert out.device.type == "meta"
    assert out.shape == (2, 70, 8)


class Scans(nn.Module):
    """Both scans as a model calls them."""

    def __init__(self, mixed: bool = False, d: int = 6, n: int = 3) -> None:
        super().__init__()
        self.mixed = mixed
        self.A = nn.Parameter(-torch.rand(d, n))
        self.D = nn.Parameter(torch.randn(d))
        self.bc = nn.Linear(d, 2 * n)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bc = self.bc(x)
        mix: torch.Tensor | None = None
        if self.mixed:
            mix = x.mean(1)[:, :2]
        f = Direction(x, x, bc, self.A, self.D, self.D, False)
        g = Direction(x, x, bc, self.A, self.D, self.D, True)
        return scan([scan_input(f, scan([f, g], x, mix, 0.5))])


def scan_input(f: Direction, u: torch.Tensor) -> Direction:
    return Direction(u, f.delta, f.bc, f.A, f.D, f.delta_bias, f.reverse)


def same_as_eager(transformed, module, *arguments):
    eager, other = module(*arguments), transformed(*arguments)
    assert_close("out", other, eager, "float32")
    weights = list(module.parameters())
    expected = torch.autograd.grad(eager.square().sum(), weights)
    for k, (a, b) in enumerate(zip(torch.autograd.grad(other.square().sum(), weights), expected, strict=True)):
        assert_close(f"weight {k}", a, b, "float32")


@pytest.mark.parametrize("mixed", (False, True))
def test_compiles_into_one_graph(mixed):
    module = Scans(mixed)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for l in (9, 70):
        same_as_eager(compiled, module, torch.randn(2, l, 6))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a compiler on a CPU")
@pytest.mark.filterwarnings("ignore")
def test_compiles_with_inductor():
    module = Scans()
    same_as_eager(torch.compile(module, fullgraph=True), module, torch.randn(2, 70, 6))


def test_exports():
    module, x = Scans(), torch.randn(2, 70, 6)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(module, (x,), dynamic_shapes={"x": {1: tokens}})
    for l in (70, 9):
        x = torch.randn(2, l, 6)
        assert torch.equal(program.module()(x), module(x))


@no_jit_warning
@pytest.mark.parametrize("mixed", (False, True))
def test_scripts_and_traces(mixed):
    module, x = Scans(mixed), torch.randn(2, 9, 6)
    graph = torch.fx.symbolic_trace(module)
    for transformed in (torch.jit.script(module), graph, torch.jit.script(graph)):
        same_as_eager(transformed, module, x)
    with use_backend("reference"):
        assert_close("backend inside the script", torch.jit.script(module)(x), module(x), "float64")


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_scan_alone(backend):
    module, x = Scans(), torch.randn(2, 30, 6)
    with use_backend(backend):
        exact = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            rough = module(x)
    assert rough.dtype == torch.float32  # of u; only the projection is rounded
    assert_close("out", rough, exact, "bfloat16")
    assert not torch.equal(rough, exact)


@pytest.mark.parametrize("backend", ("reference", "numba"))
def test_saved_values_are_the_states_after_each_chunk(backend):
    chunk = {"reference": scan_reference, "numba": scan_kernels_numba}[backend].CHUNK
    x = bidirectional_inputs(1, 2 * chunk + 1, 4, 3)
    operands = [t for f in directions_of(x) for t in f[:6]]
    _, saved = torch.ops.semivim.scan(operands, [False, True], x["z"], None, 0.5, True, backend)
    states = saved.view(1, 2, 3, 3, 4)
    # The state after the second chunk is the last one of a scan that is cut there.
    forward = directions_of(x)[0]
    cut = Direction(*(t[:, : 2 * chunk] if t.dim() == 3 else t for t in forward[:6]))
    assert_close("state", states[0, 0, 1].t(), scan_reference.last_state(cut)[0])
