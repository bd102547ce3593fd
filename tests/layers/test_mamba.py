import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from semivim.layers import mamba
from semivim.layers.mamba import BidirectionalMamba
from semivim.layers.ssmixup_readout import SSMIXUP_C
from semivim.ops import scan_numba, use_backend
from tests.tolerance import assert_close

DIM, TOKENS, BATCH = 8, 7, 3


def make_mixer(**kwargs) -> BidirectionalMamba:
    """A mixer whose two directions differ in every weight, so that a swap shows."""
    mixer = BidirectionalMamba(DIM, d_state=4, **kwargs)
    with torch.no_grad():
        for weight in mixer.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)
    return mixer


def states_of(mixer: BidirectionalMamba, x: Tensor, suffix: str) -> tuple[Tensor, ...]:
    """Hidden states (b, e, n, l) of one direction, in that direction's order, by the definition."""
    u, z = mixer.in_proj(x).transpose(1, 2).chunk(2, dim=1)
    conv, x_proj, dt_proj = (getattr(mixer, name + suffix) for name in ("conv1d", "x_proj", "dt_proj"))
    A_log, D = (mixer.A_b_log, mixer.D_b) if suffix else (mixer.A_log, mixer.D)
    if suffix:
        u, z = u.flip(-1), z.flip(-1)
    l = u.shape[-1]
    u = F.silu(conv(u)[..., :l])
    dt, B, C = x_proj(u.transpose(1, 2)).split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=-1)
    delta = F.softplus(dt_proj(dt)).transpose(1, 2)
    A = -A_log.exp()
    h = torch.zeros(x.shape[0], u.shape[1], mixer.d_state, dtype=x.dtype)
    states = []
    for t in range(l):
        decay = (delta[:, :, t, None] * A).exp()
        h = decay * h + (delta[:, :, t] * u[:, :, t])[..., None] * B[:, t, None, :]
        states.append(h)
    return torch.stack(states, -1), C.transpose(1, 2), D[:, None] * u, F.silu(z)


def mixer_by_definition(mixer: BidirectionalMamba, x: Tensor, reading: str, psi: Tensor, nu: Tensor) -> Tensor:
    """Semi-ViM Eq. (14)-(16) with materialised states and flips, halved as Vim does."""
    h_f, C_f, skip_f, gate = states_of(mixer, x, "")
    h_b, C_b, skip_b, _ = (v.flip(-1) for v in states_of(mixer, x, "_b"))
    read = lambda C, h: torch.einsum("bnl,benl->bel", C, h)  # noqa: E731
    psi, nu = psi.view(-1, 1, 1), nu.view(-1, 1, 1)
    h_mix = psi[..., None] * h_f + (1 - psi[..., None]) * h_b
    mixed = {
        "own": psi * read(C_f, h_f) + (1 - psi) * read(C_b, h_b),
        "fwd": read(C_f, h_mix),
        "bwd": read(C_b, h_mix),
        "mean": (read(C_f, h_mix) + read(C_b, h_mix)) / 2,
    }[reading]
    y = gate * (read(C_f, h_f) + skip_f) + gate * (read(C_b, h_b) + skip_b) + nu * mixed
    return mixer.out_proj(y.transpose(1, 2) / 2)


@pytest.mark.parametrize("reading", SSMIXUP_C)
def test_mixing_equals_materialised_states_in_values_and_gradients(reading):
    mixer = make_mixer(ssmixup_c=reading).double()
    x = torch.randn(BATCH, TOKENS, DIM, dtype=torch.float64, requires_grad=True)
    psi, nu = torch.rand(BATCH).double(), torch.tensor([0.0, 0.1, 1.0]).double()
    inputs = [x, *mixer.parameters()]
    grad = torch.randn(BATCH, TOKENS, DIM, dtype=torch.float64)
    wanted = mixer_by_definition(mixer, x, reading, psi, nu)
    wanted_grads = torch.autograd.grad(wanted, inputs, grad)
    y = mixer(x, psi, nu)
    assert_close("y", y, wanted, "float64")
    for name, actual, expected in zip(
        ["x", *dict(mixer.named_parameters())], torch.autograd.grad(y, inputs, grad), wanted_grads, strict=True
    ):
        assert_close(name, actual, expected, "float64")


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("reading", SSMIXUP_C)
def test_no_mixing_is_bit_for_bit_mixing_of_strength_zero(reading, backend):
    mixer = make_mixer(ssmixup_c=reading)
    x = torch.randn(BATCH, TOKENS, DIM)
    with use_backend(backend):
        assert torch.equal(mixer(x), mixer(x, torch.rand(BATCH), torch.zeros(BATCH)))


def test_rows_mix_on_their_own():
    mixer = make_mixer()
    x, psi, nu = torch.randn(BATCH, TOKENS, DIM), torch.rand(BATCH), torch.tensor([0.0, 0.5, 1.0])
    together = mixer(x, psi, nu)
    for i in range(BATCH):
        assert_close(f"row {i}", together[i], mixer(x[i : i + 1], psi[i : i + 1], nu[i : i + 1])[0])


def test_swapping_the_directions_and_flipping_the_input_flips_the_output():
    mixer = make_mixer().double()
    swapped = BidirectionalMamba(DIM, d_state=4).double()
    names = {"A_log": "A_b_log", "D": "D_b", "conv1d": "conv1d_b", "x_proj": "x_proj_b", "dt_proj": "dt_proj_b"}
    names.update({v: k for k, v in names.items()})
    other = {}
    for key, value in mixer.state_dict().items():
        first, _, rest = key.partition(".")
        other[f"{names.get(first, first)}{'.' if rest else ''}{rest}"] = value
    swapped.load_state_dict(other)
    x = torch.randn(BATCH, TOKENS, DIM, dtype=torch.float64)
    assert_close("flipped", swapped(x.flip(1)).flip(1), mixer(x), "float64")


def test_without_the_backward_direction_no_token_sees_a_later_one():
    mixer = make_mixer()
    with torch.no_grad():
        mixer.D_b.zero_()
        mixer.x_proj_b.weight[-mixer.d_state :].zero_()
    x = torch.randn(1, TOKENS, DIM)
    later = x.clone()
    later[:, 4:] = torch.randn(1, TOKENS - 4, DIM)
    assert torch.equal(mixer(x)[:, :4], mixer(later)[:, :4])
    assert not torch.equal(mixer(x)[:, 4:], mixer(later)[:, 4:])


def test_initial_weights_are_vims():
    mixer = BidirectionalMamba(64)
    assert torch.equal(mixer.A_log, torch.arange(1.0, 17.0).log().expand(128, 16))
    assert torch.equal(mixer.A_log, mixer.A_b_log)
    assert mixer.D.eq(1).all() and mixer.D_b.eq(1).all()
    assert not mixer.dt_proj_b.bias.any()
    step = F.softplus(mixer.dt_proj.bias)
    assert step.min() >= 1e-3 - 1e-6 and step.max() <= 0.1 + 1e-6
    # log(step) is uniform: its mean lies in the middle.
    assert abs(step.log().mean() - math.log(1e-2)) < 0.5
    for name, fan_in in (("in_proj", 64), ("x_proj", 128), ("x_proj_b", 128), ("dt_proj", 4), ("dt_proj_b", 4)):
        weight = getattr(mixer, name).weight
        assert 0.9 < weight.abs().max() * fan_in**0.5 <= 1
    for conv in (mixer.conv1d, mixer.conv1d_b):
        assert 0.45 < conv.weight.abs().max() <= 0.5 and conv.bias.abs().max() <= 0.5


def test_reset_parameters_draws_everything_again():
    mixer = BidirectionalMamba(DIM, device="meta").to_empty(device="cpu")
    for weight in mixer.parameters():
        weight.data.fill_(torch.nan)
    mixer.reset_parameters()
    assert all(weight.isfinite().all() for weight in mixer.parameters())


def test_decay_and_state_keep_float32_in_a_bfloat16_mixer():
    mixer = make_mixer()
    x = torch.randn(BATCH, TOKENS, DIM)
    wanted = mixer(x)
    y = mixer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert_close("y", y, wanted, "bfloat16")


@pytest.mark.parametrize("direct", (True, False), ids=("direct", "ops"))
def test_nothing_is_copied_between_the_projections(monkeypatch, direct):
    """The scan reads the gate and [B | C] as strided views of the projections' outputs."""
    seen = {}
    original = scan_numba.forward

    def spy(directions, z, *rest):
        seen.update(bc=directions[0].bc, z=z)
        return original(directions, z, *rest)

    monkeypatch.setattr(scan_numba, "forward", spy)
    mixer = make_mixer()
    if not direct:
        monkeypatch.setattr(mamba, "is_eager", lambda _: False)
    mixer(torch.randn(BATCH, TOKENS, DIM))
    assert seen["z"].stride() == (TOKENS * 4 * DIM, 4 * DIM, 1)
    assert seen["bc"].stride(1) == mixer.dt_rank + 2 * mixer.d_state


def test_an_unknown_reading_is_named():
    with pytest.raises(ValueError, match="'both', wanted one of"):
        BidirectionalMamba(DIM, ssmixup_c="both")


@pytest.mark.parametrize("reading", SSMIXUP_C)
def test_shares_and_strengths_are_constants(reading):
    mixer = make_mixer(ssmixup_c=reading)
    psi, nu = (torch.rand(BATCH, requires_grad=True) for _ in range(2))
    mixer(torch.randn(BATCH, TOKENS, DIM), psi, nu).square().sum().backward()
    assert psi.grad is None and nu.grad is None
    assert mixer.x_proj.weight.grad.any()


class Doubled(torch.nn.Module):
    """Twice a layer, as an adapter of it would be."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 2 * self.layer(x)


@pytest.mark.parametrize("ends", [("",), ("_b",), ("", "_b")], ids=str)
def test_replaced_layers_are_called(ends):
    mixer = make_mixer().double()
    x = torch.randn(BATCH, TOKENS, DIM, dtype=torch.float64)
    for end in ends:
        setattr(mixer, f"dt_proj{end}", Doubled(getattr(mixer, f"dt_proj{end}")))
        setattr(mixer, f"conv1d{end}", Doubled(getattr(mixer, f"conv1d{end}")))
    zeros = torch.zeros(BATCH, dtype=torch.float64)
    assert_close("y", mixer(x), mixer_by_definition(mixer, x, "own", zeros, zeros), "float64")


@pytest.mark.parametrize("name", ["dt_proj", "dt_proj_b", "conv1d", "conv1d_b", "in_proj", "x_proj", "out_proj"])
def test_hooks_fire(name):
    mixer, x, seen = make_mixer(), torch.randn(BATCH, TOKENS, DIM), []
    plain = mixer(x)
    getattr(mixer, name).register_forward_hook(lambda module, *_: seen.append(module))
    assert_close("y", mixer(x), plain)
    assert seen == [getattr(mixer, name)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_layers_run():
    mixer = make_mixer()
    x = torch.randn(BATCH, TOKENS, DIM)
    quantised = torch.ao.quantization.quantize_dynamic(mixer, {torch.nn.Linear})
    assert type(quantised.dt_proj) is not torch.nn.Linear
    y = quantised(x)
    assert not torch.equal(y, mixer(x))
    assert_close("y", y, mixer(x), "bfloat16")


def test_an_adapter_of_peft_gets_gradients():
    peft = pytest.importorskip("peft")
    mixer = peft.get_peft_model(make_mixer(), peft.LoraConfig(target_modules=["dt_proj", "dt_proj_b"]))
    mixer(torch.randn(BATCH, TOKENS, DIM)).square().sum().backward()
    adapters = {name: p.grad for name, p in mixer.named_parameters() if "lora_B" in name}
    assert len(adapters) == 2
    assert all(grad is not None and grad.any() for grad in adapters.values())


def test_layers_without_bias_are_called():
    mixer = make_mixer().double()
    for name in ("dt_proj", "dt_proj_b"):
        old = getattr(mixer, name)
        setattr(mixer, name, torch.nn.Linear(old.in_features, old.out_features, bias=False).double())
    for name in ("conv1d", "conv1d_b"):
        old = getattr(mixer, name)
        new = torch.nn.Conv1d(old.in_channels, old.out_channels, 4, groups=old.groups, padding=3, bias=False)
        setattr(mixer, name, new.double())
    x, zeros = torch.randn(BATCH, TOKENS, DIM).double(), torch.zeros(BATCH).double()
    assert_close("y", mixer(x), mixer_by_definition(mixer, x, "own", zeros, zeros), "float64")


@pytest.mark.parametrize("name", ("A_log", "A_b_log", "D", "D_b"))
def test_parametrised_parameters_are_used(name):
    mixer, x = make_mixer(), torch.randn(BATCH, TOKENS, DIM)
    doubled = make_mixer()
    doubled.load_state_dict(mixer.state_dict())
    with torch.no_grad():
        getattr(doubled, name).mul_(2)

    class Twice(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    torch.nn.utils.parametrize.register_parametrization(mixer, name, Twice())
    assert_close("y", mixer(x), doubled(x))


def test_shares_of_another_shape_are_refused():
    mixer, x = make_mixer(), torch.randn(BATCH, TOKENS, DIM)
    for shape in ((1,), (BATCH, 1), (BATCH + 1,)):
        with pytest.raises(ValueError, match="mix must be"):
            mixer(x, torch.full(shape, 0.5), torch.ones(shape))


def test_no_image_gives_no_output():
    mixer = make_mixer()
    x = torch.randn(0, TOKENS, DIM, requires_grad=True)
    y = mixer(x)
    assert y.shape == (0, TOKENS, DIM)
    y.sum().backward()
    assert x.grad.shape == x.shape
    with torch.no_grad():
        assert mixer(x).shape == (0, TOKENS, DIM)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_hooked_layer_is_not_scripted_away():
    mixer = make_mixer()
    x = torch.randn(BATCH, TOKENS, DIM)
    assert_close("y", torch.jit.script(mixer)(x), mixer(x))
    mixer.dt_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="cannot be scripted: a layer of it is replaced, hooked"):
        torch.jit.script(mixer)


@pytest.mark.parametrize("direct", (True, False), ids=("direct", "ops"))
@pytest.mark.parametrize("end", ("", "_b"), ids=("forward", "backward"))
def test_one_direction_equals_its_states_in_values_and_gradients(monkeypatch, end, direct):
    if not direct:
        monkeypatch.setattr(mamba, "is_eager", lambda _: False)
    mixer = make_mixer().double()
    x = torch.randn(BATCH, TOKENS, DIM, dtype=torch.float64, requires_grad=True)
    h, C, skip, gate = states_of(mixer, x.flip(1) if end else x, end)  # which flips back
    wanted = mixer.out_proj((gate * (torch.einsum("bnl,benl->bel", C, h) + skip)).transpose(1, 2))
    y = mixer.one_direction(x, bool(end))
    assert_close("y", y, wanted, "float64")
    other = {id(pair[0 if end else 1]) for pair in mixer.twins()}
    used = {name: p for name, p in mixer.named_parameters() if id(p) not in other}
    unused = [p for p in mixer.parameters() if id(p) in other]
    grad = torch.randn_like(wanted)
    expected = torch.autograd.grad(wanted, [x, *used.values()], grad)
    actual = torch.autograd.grad(y, [x, *used.values()], grad, retain_graph=True)
    for name, a, b in zip(["x", *used], actual, expected, strict=True):
        assert_close(name, a, b, "float64")
    assert torch.autograd.grad(y.sum(), unused, allow_unused=True) == (None,) * 7


def test_twins_are_all_that_a_direction_has_of_its_own():
    mixer = make_mixer()
    twins = {id(p) for pair in mixer.twins() for p in pair}
    shared = [name for name, p in mixer.named_parameters() if id(p) not in twins]
    assert shared == ["in_proj.weight", "out_proj.weight"]
    assert all(f is not b and f.shape == b.shape for f, b in mixer.twins())


def test_a_hooked_layer_of_one_direction_is_called():
    mixer, x, seen = make_mixer(), torch.randn(BATCH, TOKENS, DIM), []
    plain = mixer.one_direction(x, True)
    for name in ("conv1d", "conv1d_b", "x_proj_b", "dt_proj"):
        getattr(mixer, name).register_forward_hook(lambda module, *_: seen.append(module))
    assert_close("y", mixer.one_direction(x, True), plain)
    assert seen == [mixer.conv1d_b, mixer.x_proj_b]
