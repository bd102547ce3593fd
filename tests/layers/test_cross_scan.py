import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from semivim.layers import cross_scan
from semivim.layers.cross_scan import SS2D
from semivim.ops import use_backend
from semivim.ops.scan import scan
from tests.ops.triton_runs import interpreted, run_in_interpreter
from tests.tolerance import assert_close

DIM, ROWS, COLUMNS, BATCH = 6, 3, 5, 2
VARIANTS = [{"ssm_ratio": 1}, {"ssm_ratio": 2}, {"ssm_ratio": 2, "d_state": 4, "gated": True}]


def make_mixer(**kwargs) -> SS2D:
    """A mixer whose directions differ in every weight, so that a swap shows."""
    mixer = SS2D(DIM, **kwargs)
    with torch.no_grad():
        for weight in mixer.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)
    return mixer


def paths() -> list[list[int]]:
    """Numbers of the map's tokens, counted by rows, in the order of each direction."""
    rows = [r * COLUMNS + c for r in range(ROWS) for c in range(COLUMNS)]
    columns = [r * COLUMNS + c for c in range(COLUMNS) for r in range(ROWS)]
    return [rows, columns, rows[::-1], columns[::-1]]


def mixer_by_definition(mixer: SS2D, x: Tensor) -> Tensor:
    """The release's order of work: four copies of the map in the order of each direction, a loop over their tokens."""
    d, r, n = mixer.out_proj.in_features, mixer.dt_rank, mixer.d_state
    xz = x @ mixer.in_proj.weight.t()
    u = F.conv2d(xz[..., :d].permute(0, 3, 1, 2), mixer.conv2d.weight, mixer.conv2d.bias, padding=1, groups=d)
    tokens = F.silu(u).permute(0, 2, 3, 1).flatten(1, 2)
    y = torch.zeros_like(tokens)
    for k, path in enumerate(paths()):
        A, D = -mixer.A_logs.view(4, d, n)[k].exp(), mixer.Ds.view(4, d)[k]
        h = torch.zeros(BATCH, d, n, dtype=x.dtype)
        for t in path:
            now = tokens[:, t]
            low, B, C = (now @ mixer.x_proj_weight[k].t()).split([r, n, n], -1)
            dt = F.softplus(low @ mixer.dt_projs_weight[k].t() + mixer.dt_projs_bias[k])
            h = (dt[..., None] * A).exp() * h + (dt * now)[..., None] * B[:, None]
            read = (h * C[:, None]).sum(-1) + D * now
            y = y.index_add(1, torch.tensor([t]), read[:, None])
    y = F.layer_norm(y, (d,), mixer.out_norm.weight, mixer.out_norm.bias, 1e-5).view(*x.shape[:3], d)
    if mixer.gated:
        y = y * F.silu(xz[..., d:])
    return y @ mixer.out_proj.weight.t()


def with_gradients(function, mixer: SS2D, x: Tensor) -> dict[str, Tensor]:
    y = function(x)
    weights = {"x": x, **dict(mixer.named_parameters())}
    gradients = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), list(weights.values()))
    return {"y": y, **dict(zip(weights, gradients, strict=True))}


def check_by_definition(options, backend):
    mixer, x = make_mixer(**options), torch.randn(BATCH, ROWS, COLUMNS, DIM, requires_grad=True)
    with use_backend(backend):
        actual = with_gradients(mixer, mixer, x)
    expected = with_gradients(lambda x: mixer_by_definition(mixer, x), mixer, x)
    for name, value in actual.items():
        assert_close(name, value, expected[name], "float32_grad")


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_it_is_the_release_by_definition(options, backend):
    check_by_definition(options, backend)


@interpreted
def test_it_is_the_release_by_definition_in_triton():
    check_by_definition({"ssm_ratio": 1}, "triton")


def test_in_the_interpreter():
    run_in_interpreter(__file__, "-k", "in_triton")


def test_two_pairs_of_opposite_directions_share_their_tokens_and_copy_the_map_once(monkeypatch):
    pairs = []

    def keep(directions):
        pairs.append(directions)
        return scan(directions)

    monkeypatch.setattr(cross_scan, "scan", keep)
    transpositions = []
    transposed = cross_scan.transposed
    monkeypatch.setattr(cross_scan, "transposed", lambda x: transpositions.append(x) or transposed(x))
    mixer = make_mixer()
    u = torch.randn(BATCH, ROWS, COLUMNS, 2 * DIM)
    mixer.scan(u)
    assert [[f.reverse for f in pair] for pair in pairs] == [[False, True]] * 2 and len(transpositions) == 1
    for pair in pairs:
        assert pair[0].u is pair[1].u and {f.A.shape for f in pair} == {(2 * DIM, 1)}
    assert pairs[0][0].u.data_ptr() == u.data_ptr()
    assert torch.equal(pairs[1][0].u, u.flatten(1, 2)[:, paths()[1]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scans_and_norm_are_float32_whatever_the_models_precision(dtype, monkeypatch):
    seen = []

    def keep(directions):
        seen.extend((f.u.dtype, f.A.dtype) for f in directions)
        y = scan(directions)
        seen.append((y.dtype, y.dtype))
        return y

    monkeypatch.setattr(cross_scan, "scan", keep)
    mixer, x = make_mixer(ssm_ratio=2, d_state=2, gated=True), torch.randn(BATCH, ROWS, COLUMNS, DIM)
    expected = mixer(x)
    with torch.autocast("cpu", dtype):
        y = mixer(x)
    assert y.dtype == dtype and set(seen) == {(torch.float32, torch.float32)}
    assert F.cosine_similarity(y.float().flatten(), expected.flatten(), 0) > 0.999
    y = mixer.to(dtype)(x.to(dtype))
    assert y.dtype == dtype and set(seen) == {(torch.float32, torch.float32)}
    y = mixer.double()(x.double())
    assert y.dtype == seen[-1][0] == torch.float64


def test_a_step_bias_below_half_precision_still_counts():
    """The sum of a step and its bias is made in float32: in bfloat16 the two step sizes would be the same."""
    mixer, u = make_mixer(), torch.randn(1, ROWS, COLUMNS, 2 * DIM)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixer.dt_projs_weight.zero_()
        mixer.dt_projs_bias.fill_(3.0)
        before = mixer.scan(u)
        mixer.dt_projs_bias.add_(2.0**-10)  # a bfloat16 of 3 has steps of 2**-6
        assert (mixer.scan(u) - before).abs().max() > 0


def test_the_norm_is_that_of_the_release_for_small_values_too():
    mixer, y = make_mixer(), 1e-3 * torch.randn(1, ROWS, COLUMNS, 2 * DIM)
    scaled = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    assert_close("y", mixer.out_norm(y), scaled * mixer.out_norm.weight + mixer.out_norm.bias)


def test_every_layer_is_called():
    """Hooks see it, and a layer may be wrapped, as adapters do."""
    mixer, x, called = make_mixer(gated=True), torch.randn(1, ROWS, COLUMNS, DIM), []
    expected = mixer(x)
    for name, layer in list(mixer.named_children()):
        layer.register_forward_hook(lambda *_, name=name: called.append(name))
        setattr(mixer, name, nn.Sequential(layer))
    assert torch.equal(mixer(x), expected)
    assert sorted(called) == ["conv2d", "in_proj", "out_norm", "out_proj"]
