import copy

import pytest
import torch

from semivim.layers import dynamic_mamba
from semivim.layers.dynamic_mamba import DynamicMamba, gate_decisions
from semivim.layers.mamba import BidirectionalMamba
from semivim.ops import use_backend
from tests.tolerance import assert_close

CHOICES = [[True, True], [True, False], [False, True], [False, False]]


@pytest.fixture(params=["reference", "numba"])
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def mixer():
    torch.manual_seed(0)
    return DynamicMamba(32).eval()


def choose(mixer, monkeypatch, choices):
    """Let the images of a batch choose these directions."""
    logits = torch.tensor(choices).float() * 2 - 1
    mixer.block_head.register_forward_hook(lambda module, args, out: logits.view_as(out).to(out.dtype))


def one_way(mixer, reverse):
    """The plain mixer with the other direction silenced, as far as its D, C and B can say so."""
    plain = BidirectionalMamba(32).eval()
    plain.load_state_dict({k: v for k, v in mixer.state_dict().items() if not k.startswith("block_head")})
    with torch.no_grad():
        x_proj, D = (plain.x_proj, plain.D) if reverse else (plain.x_proj_b, plain.D_b)
        x_proj.weight[-16:] = 0
        D.zero_()
    return plain


@pytest.mark.parametrize("branches", [True, False])
def test_images_get_the_directions_that_they_chose(mixer, backend, branches, monkeypatch):
    if not branches:
        monkeypatch.setattr(dynamic_mamba, "_may_branch", lambda x: False)
    choose(mixer, monkeypatch, [CHOICES[i] for i in (2, 0, 3, 1, 0, 2)])
    x = torch.randn(6, 9, 32)
    with torch.no_grad():
        y, decisions = mixer(x)
        both = BidirectionalMamba(32).eval()
        both.load_state_dict(one_way(mixer, False).state_dict() | dict(mixer.state_dict().items()), strict=False)
        assert_close("both", y[[1, 4]], both(x)[[1, 4]])
        assert_close("forward", y[3], one_way(mixer, False)(x)[3])
        assert_close("backward", y[[0, 5]], one_way(mixer, True)(x)[[0, 5]])
    assert not y[2].any()
    assert (decisions > 0).tolist() == [[0, 1], [1, 1], [0, 0], [1, 0], [1, 1], [0, 1]]


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_batch_of_one_mind(mixer, batch, choice, monkeypatch):
    choose(mixer, monkeypatch, [choice] * batch)
    x = torch.randn(batch, 9, 32)
    with torch.no_grad():
        y, decisions = mixer(x)
        monkeypatch.setattr(dynamic_mamba, "_may_branch", lambda x: False)
        assert_close("output", y, mixer(x)[0])
    assert (decisions > 0).tolist() == [choice] * batch


def test_what_no_image_chose_is_not_computed(mixer, monkeypatch):
    rows, projected, original = [], [], dynamic_mamba.mix_tokens

    def count(xz, weights, reverse, *args):
        rows.append((len(xz), reverse))
        return original(xz, weights, reverse, *args)

    monkeypatch.setattr(dynamic_mamba, "mix_tokens", count)
    mixer.in_proj.register_forward_hook(lambda module, args, out: projected.append(tuple(out.shape[:2])))
    choose(mixer, monkeypatch, [CHOICES[i] for i in (3, 0, 3, 1, 0, 3)])
    with torch.no_grad():
        mixer(torch.randn(6, 9, 32))
    assert rows == [(2, [False, True]), (1, [False])]
    assert projected == [(6, 128), (3, 9)]
    rows.clear()
    mixer.block_head._forward_hooks.clear()
    choose(mixer, monkeypatch, [CHOICES[3]] * 6)
    with torch.no_grad():
        mixer(torch.randn(6, 9, 32))
    assert rows == [] and projected[2:] == [(6, 128)]


def test_the_gate_reads_the_class_token_of_the_projection(mixer):
    torch.nn.init.normal_(mixer.block_head.weight)
    x = torch.randn(5, 9, 32)
    with torch.no_grad():
        wanted = mixer.block_head(mixer.in_proj(x)[:, 4]) > 0
        assert torch.equal(mixer(x)[1] > 0, wanted) and wanted.any() and not wanted.all()
        slot = torch.tensor([[0], [1], [2], [3], [8]])
        wanted = mixer.block_head(mixer.in_proj(x)[torch.arange(5), slot[:, 0]]) > 0
        assert torch.equal(mixer(x, torch.ones(5, 9, 1), slot)[1] > 0, wanted)


def test_gradients_in_evaluation_are_those_of_the_masked_path(mixer, monkeypatch):
    choose(mixer, monkeypatch, CHOICES)
    x, seed = torch.randn(4, 9, 32, requires_grad=True), torch.randn(4, 9, 32)
    weights = [x, *(p for name, p in mixer.named_parameters() if "block_head" not in name)]
    chosen = torch.autograd.grad(mixer(x)[0], weights, seed)
    monkeypatch.setattr(dynamic_mamba, "_may_branch", lambda x: False)
    for i, (a, b) in enumerate(zip(chosen, torch.autograd.grad(mixer(x)[0], weights, seed), strict=True)):
        assert_close(str(i), a, b, "float32_grad")


def test_masked_tokens_at_the_end_are_as_if_they_were_gone(mixer, backend):
    x, slot = torch.randn(2, 9, 32), torch.full((2, 1), 2)
    mask = torch.tensor([1.0] * 5 + [0.0] * 4).view(1, 9, 1).expand(2, -1, -1)
    with torch.no_grad():
        padded, alone = mixer(x, mask, slot)[0], mixer(x[:, :5])[0]
    assert_close("kept", padded[:, :5], alone)
    assert not padded[:, 5:].any()


def test_training_gates_are_drawn_and_every_parameter_gets_a_gradient(mixer):
    mixer.train()
    y, gates = mixer(torch.randn(64, 9, 32))
    assert 0.95 < gates.mean() <= 1  # sigmoid(5) are on
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in mixer.parameters())


def test_gate_decisions():
    torch.manual_seed(0)
    logits = torch.full((4000, 2), 1.0, requires_grad=True)
    gates = gate_decisions(logits)
    assert abs(gates.mean() - torch.tensor(1.0).sigmoid()) < 0.02
    assert set(gates.detach().flatten().tolist()) <= {0.0, 1.0}
    gates.sum().backward()
    # The gradient of a sigmoid of temperature 2 is at most 1 / 8.
    assert logits.grad.min() > 0 and 0.1 < logits.grad.max() <= 0.125


def test_replaced_layers_are_called(mixer, monkeypatch):
    other = copy.deepcopy(mixer)
    other.dt_proj.register_forward_hook(lambda module, args, out: 0 * out)
    choose(mixer, monkeypatch, CHOICES)
    choose(other, monkeypatch, CHOICES)
    x = torch.randn(4, 9, 32)
    with torch.no_grad():
        a, b = mixer(x)[0], other(x)[0]
    assert_close("without the forward direction", b[2:], a[2:])
    assert not torch.allclose(a[:2], b[:2])
