import pytest
import torch

from semivim.layers import BidirectionalMamba, mamba
from semivim.ops import mixer as mixer_ops
from semivim.ops import scan_numba, use_backend
from semivim.ops.backends import choose
from semivim.ops.mixer import DirectionWeights, decay_rate, mix_tokens
from tests.ops.conv_cases import conv_inputs, pairs
from tests.ops.scan_cases import BACKENDS, bidirectional_inputs, directions_of
from tests.tolerance import assert_close

BATCH, TOKENS, DIM = 3, 70, 8


def make_mixer(dtype=torch.float32):
    mixer = BidirectionalMamba(DIM, d_state=4)
    with torch.no_grad():
        for weight in mixer.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)
    return mixer.to(dtype)


def run(mixer, x, mix=()):
    """Output and gradients of the input and of every parameter that has one."""
    x = x.detach().requires_grad_()
    y = mixer(x, *mix)
    learned = {name: p for name, p in mixer.named_parameters() if p.requires_grad}
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(y.dtype)
    return {"y": y, **dict(zip(("x", *learned), torch.autograd.grad(y, [x, *learned.values()], grad), strict=True))}


@pytest.fixture
def both_paths(monkeypatch):
    """Run a mixer by its direct path and by the registered ops."""

    def run_both(mixer, x, *mix):
        direct = run(mixer, x, mix)
        with monkeypatch.context() as patch:
            patch.setattr(mamba, "is_eager", lambda _: False)
            return direct, run(mixer, x, mix)

    return run_both


def compare(direct, by_ops, tolerance):
    assert list(direct) == list(by_ops)
    for name, expected in by_ops.items():
        assert direct[name].dtype == expected.dtype and direct[name].shape == expected.shape
        assert_close(name, direct[name], expected, tolerance)


@pytest.mark.parametrize("mixed", (False, True), ids=("plain", "mixed"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_both_paths_agree(both_paths, backend, mixed):
    mix = (torch.rand(BATCH), torch.rand(BATCH)) if mixed else ()
    with use_backend(backend):
        compare(*both_paths(make_mixer(), torch.randn(BATCH, TOKENS, DIM), *mix), "float32_grad")


def test_both_paths_agree_in_float64(both_paths):
    compare(*both_paths(make_mixer(torch.float64), torch.randn(BATCH, TOKENS, DIM).double()), "float64")


def test_both_paths_agree_in_bfloat16(both_paths):
    compare(*both_paths(make_mixer(torch.bfloat16), torch.randn(BATCH, TOKENS, DIM).bfloat16()), "bfloat16")


def test_both_paths_agree_under_autocast(both_paths):
    mixer, x = make_mixer(), torch.randn(BATCH, TOKENS, DIM)
    exact = run(mixer, x)
    with torch.autocast("cpu", torch.bfloat16):
        direct, by_ops = both_paths(mixer, x)
    compare(direct, by_ops, "bfloat16")
    assert direct["y"].dtype == torch.bfloat16 and direct["A_log"].dtype == torch.float32
    assert_close("y", direct["y"], exact["y"], "bfloat16")


@pytest.mark.parametrize("frozen", ("conv1d", "x_proj_b", "dt_proj", "A_log", "in_proj", ""), ids=str)
def test_frozen_weights_get_no_gradient(both_paths, frozen):
    mixer = make_mixer()
    for name, p in mixer.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    compare(*both_paths(mixer, torch.randn(BATCH, TOKENS, DIM)), "float32_grad")


def test_without_gradients_the_numbers_are_the_same():
    mixer, x = make_mixer(), torch.randn(BATCH, TOKENS, DIM)
    y = mixer(x)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(mixer(x), y)


@pytest.mark.parametrize("mixed", (False, True), ids=("plain", "mixed"))
def test_images_one_group_after_the_other_give_the_same_numbers(monkeypatch, mixed):
    mixer, x = make_mixer(), torch.randn(5, TOKENS, DIM)
    mix = (torch.rand(5), torch.rand(5)) if mixed else ()
    launched, forward = [], scan_numba.forward

    def counted(directions, *args):
        launched.append(len(directions[0].u))
        return forward(directions, *args)

    monkeypatch.setattr(scan_numba, "forward", counted)
    with torch.no_grad():
        together = mixer(x, *mix)
        monkeypatch.setattr(mixer_ops, "_BYTES_TOGETHER", -(-2 * TOKENS * 2 * DIM * 4 // torch.get_num_threads()))
        assert_close("y", mixer(x, *mix), together, "float32")
    assert launched == [5, 2, 2, 1]


@pytest.mark.parametrize("direct", (True, False), ids=("direct", "ops"))
def test_second_derivatives_are_right(monkeypatch, direct):
    """By finite differences of the gradient, in float64, which the reference backend keeps."""
    if not direct:
        monkeypatch.setattr(mamba, "is_eager", lambda _: False)
    mixer = make_mixer(torch.float64)
    x = torch.randn(1, 4, DIM, dtype=torch.float64, requires_grad=True)
    names, weights = zip(*mixer.named_parameters(), strict=True)
    first = torch.autograd.grad(mixer(x).square().sum(), weights, create_graph=True)
    for a, b in zip(first, torch.autograd.grad(mixer(x).square().sum(), weights), strict=True):
        torch.testing.assert_close(a, b)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), weights)
    for name, weight, gradient in zip(names, weights, second, strict=True):
        step = torch.randn_like(weight) * 1e-5
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.add_(sign * step)
            gradients = torch.autograd.grad(mixer(x).square().sum(), weights)
            values.append(sum(g.square().sum() for g in gradients))
            with torch.no_grad():
                weight.sub_(sign * step)
        expected = (values[0] - values[1]) / 2
        torch.testing.assert_close((gradient * step).sum(), expected, rtol=1e-4, atol=1e-12, msg=name)


def test_the_backward_keeps_no_step_sizes():
    """What is saved is the input, the outputs of the convolution and of x_proj, the scan's states and the weights."""
    mixer = make_mixer()
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t):
        mixer(torch.randn(BATCH, TOKENS, DIM))
    inner = 2 * DIM
    assert sizes.count((BATCH, TOKENS, inner)) == 2  # u and u_b
    assert sizes.count((BATCH, TOKENS, 2 * inner)) == 1


def test_the_decay_rate_is_computed_in_float32():
    A_log = torch.linspace(-1, 3, 50).bfloat16()
    assert decay_rate(A_log).dtype == torch.float32
    assert torch.equal(decay_rate(A_log), -A_log.float().exp())
    assert decay_rate(A_log.double()).dtype == torch.float64


def test_another_default_dtype_changes_nothing():
    mixer, x = make_mixer(), torch.randn(BATCH, TOKENS, DIM)
    expected = run(mixer, x)
    torch.set_default_dtype(torch.float64)
    try:
        actual = run(mixer, x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("n", (1, 4))
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_write_gradients_of_x_and_z_where_they_are_told(backend, n, dtype):
    tokens = 3 if backend == "triton" else 35  # the interpreter is slow
    inputs = bidirectional_inputs(2, tokens, 20, n, dtype)
    directions, weights = directions_of(inputs), list(conv_inputs(2, tokens, 20).values())[1:]
    grads, place = torch.randn(2, 2, tokens, 20).to(dtype).unbind(), (inputs["u"].device, dtype)
    scan, conv = choose("scan", backend, *place), choose("conv", backend, *place)
    _, saved = scan.forward(directions, inputs["z"], None, 0.5, True)
    of_scan = grads[0], directions, inputs["z"], None, 0.5, True, saved
    of_conv = grads, inputs["u"], pairs(*weights), [False, True]
    for backward, arguments, place in ((scan.backward, of_scan, 1), (conv.backward, of_conv, 0)):
        rows = torch.full((2, tokens, 60), torch.nan, dtype=dtype)
        half = rows[..., 20:40]
        expected, written = backward(*arguments)[place], backward(*arguments, half)[place]
        assert written is half and torch.equal(half, expected) and expected.is_contiguous()
        assert rows[..., :20].isnan().all() and rows[..., 40:].isnan().all()


@pytest.mark.parametrize("field", DirectionWeights._fields)
def test_a_weight_of_another_shape_is_named(field):
    mixer, xz = make_mixer(), torch.randn(BATCH, TOKENS, 4 * DIM)
    forward, backward = mixer._weights(("", "_b"))
    wrong = getattr(backward, field)[1:]
    with pytest.raises(ValueError, match=r"must be \(.*\), got \(.*\)"):
        mix_tokens(xz, [forward, backward._replace(**{field: wrong})], [False, True])


def test_directions_of_unlike_states_are_refused():
    (forward, _), (_, other) = (
        make_mixer()._weights(("", "_b")),
        BidirectionalMamba(DIM, d_state=5)._weights(("", "_b")),
    )
    with pytest.raises(ValueError, match=r"x_proj must be \(9, 16\), got \(11, 16\)"):
        mix_tokens(torch.randn(BATCH, TOKENS, 4 * DIM), [forward, other], [False, True])


def test_second_derivatives_under_autocast():
    mixer, x = make_mixer(), torch.randn(1, 4, DIM, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
    (first,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    exact = torch.autograd.grad(mixer(x).square().sum(), x, create_graph=True)[0]
    (expected,) = torch.autograd.grad(exact.square().sum(), x)
    assert torch.nn.functional.cosine_similarity(second.flatten(), expected.flatten(), 0) > 0.99
