import math
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from semivim.models import Vim
from semivim.models.vim_weights import checkpoint_filter_fn
from semivim.ops import use_backend
from tests.tolerance import assert_close

GOLDEN = Path(__file__).parents[1] / "golden"
NANO = {"img_size": 64, "embed_dim": 32, "depth": 3, "num_classes": 10}


@pytest.fixture(scope="module")
def golden():
    return torch.load(GOLDEN / "vim_nano.pt", weights_only=True)


@pytest.fixture
def nano(golden):
    model = Vim(**NANO).eval()
    model.load_state_dict(checkpoint_filter_fn(golden["state_dict"], model))
    return model


@pytest.fixture(params=["reference", "numba"])
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize(
    ("name", "num_params"),
    [
        ("vim_tiny_patch16_224", 7_148_008),
        ("vim_tiny_patch16_stride8_224", 7_250_344),
        ("vim_small_patch16_224", 25_796_584),
        ("vim_small_patch16_stride8_224", 26_001_256),
        ("vim_base_patch16_224", 97_598_440),
        ("semivim_tiny", 7_148_008),
        ("semivim_small", 25_796_584),
        ("semivim_base", 97_598_440),
        ("semivim_pico", 952_552),
        ("test_vim", 94_696),
    ],
)
def test_parameter_counts(name, num_params):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == num_params
    if "tiny" in name or "small" in name or "base" in name:
        assert len(model.state_dict()) == 415


def test_golden_logits_and_features(nano, golden, backend):
    with torch.no_grad():
        tokens = nano.forward_features(golden["input"])
        assert_close("features", nano.forward_head(tokens, pre_logits=True), golden["features"])
        assert_close("logits", nano(golden["input"]), golden["logits"])


def test_golden_layers(nano, golden, backend):
    """Every layer, and the inside of the first mixer, up to the order of axes."""
    inside = {}

    def keep(name, take=lambda module, args, out: out):
        return lambda *call: inside.update({name: take(*call)})

    mixer = nano.blocks[0].mixer
    mixer.in_proj.register_forward_hook(keep("xz"))
    mixer.out_proj.register_forward_hook(keep("gated", lambda module, args, out: args[0]))
    nano.norm.register_forward_hook(keep("normed"))
    for i, block in enumerate(nano.blocks):
        block.register_forward_hook(keep(f"residual{i}", lambda module, args, out: args[0]))
        block.mixer.register_forward_hook(keep(f"hidden{i}"))
    with torch.no_grad():
        nano(golden["input"])
    assert_close("tokens", inside["residual0"], golden["tokens"])
    assert_close("normed", inside["normed"], golden["normed"])
    first = golden["mixer0"]
    assert_close("xz", inside["xz"].transpose(1, 2), first["xz"])
    # The release records the backward branch in its own order and halves after the sum.
    assert_close("gated", inside["gated"].transpose(1, 2), (first["fwd"] + first["bwd"].flip(-1)) / 2)
    for i, (hidden, residual) in enumerate(zip(golden["hidden"], golden["residual"], strict=True)):
        assert_close(f"hidden {i}", inside[f"hidden{i}"], hidden)
        assert_close(f"residual {i}", inside[f"residual{i}"], residual)


def test_golden_gradients(nano, golden, backend):
    wanted = checkpoint_filter_fn(golden["grads"], nano)
    (nano(golden["input"]) * golden["grad_seed"]).sum().backward()
    for name, weight in nano.named_parameters():
        assert_close(name, weight.grad, wanted[name], "float32_grad")


def test_golden_stride8(golden, backend):
    recorded = torch.load(GOLDEN / "vim_nano_stride8.pt", weights_only=True)
    model = Vim(**NANO, patch_stride=8).eval()
    model.load_state_dict(checkpoint_filter_fn({**golden["state_dict"], **recorded["state_dict"]}, model))
    with torch.no_grad():
        tokens = model.forward_features(golden["input"])
        assert tokens.shape[1] == 50
        assert_close("features", model.forward_head(tokens, pre_logits=True), recorded["features"])
        assert_close("logits", model(golden["input"]), recorded["logits"])


def test_bfloat16_autocast_stays_close(nano, golden, backend):
    residual = []
    nano.norm.register_forward_pre_hook(lambda module, args: residual.append(args[0].dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = nano(golden["input"]).float()
    assert residual == [torch.float32]
    assert_close("logits", logits, golden["logits"], "bfloat16")
    assert nn.functional.cosine_similarity(logits.flatten(), golden["logits"].flatten(), dim=0) > 0.999


def test_float64_runs_in_float64(nano, golden):
    with torch.no_grad():
        logits = nano.double()(golden["input"].double())
    assert logits.dtype == torch.float64
    assert_close("logits", logits, golden["logits"])


def test_batch_size_does_not_change_the_result(nano, golden, backend):
    with torch.no_grad():
        assert_close("logits", nano(golden["input"])[1:], nano(golden["input"][1:]))


def test_initial_weights_are_vims():
    torch.manual_seed(1)
    model = Vim(img_size=64, embed_dim=96, depth=4)
    limit = 1 / math.sqrt(4 * 2 * 96)
    for block in model.blocks:
        assert 0.95 * limit < block.mixer.out_proj.weight.abs().max() <= limit
        assert block.norm.weight.eq(1).all()
        assert not block.mixer.dt_proj_b.bias.any()
    fan_in = 3 * 16 * 16
    assert abs(model.patch_embed.proj.weight.std() * math.sqrt(fan_in) - 1) < 0.05
    assert not model.patch_embed.proj.bias.any() and not model.head.bias.any()
    for weight in (model.pos_embed, model.head.weight, model.cls_token):
        assert 0.015 < weight.std() < 0.025


def test_stochastic_depth_grows_linearly():
    model = Vim(img_size=32, embed_dim=16, depth=5, drop_path_rate=0.2)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


def test_dropout_acts_before_the_head_and_only_there():
    model = Vim(**NANO, drop_rate=0.5)
    tokens = torch.randn(64, 17, 32)
    features = model.forward_head(tokens, pre_logits=True)
    kept = features != 0
    assert 0.4 < kept.float().mean() < 0.6
    assert_close("kept", features[kept], 2 * tokens[:, 8][kept])
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.forward_features(x), model.eval().forward_features(x))


def test_mixing_reaches_only_the_last_layers():
    seen = []
    model = timm.create_model("test_vim", ssmixup_layers=1).eval()
    for block in model.blocks:
        block.mixer.register_forward_hook(lambda module, args, out: seen.append(args[1] is not None))
    x, psi, nu = torch.randn(2, 3, 32, 32), torch.rand(2), torch.ones(2)
    model(x, psi, nu)
    assert seen == [False, False, False, True]


def test_rows_of_strength_zero_are_plain_rows():
    model = timm.create_model("test_vim").eval()
    x, psi = torch.randn(3, 3, 32, 32), torch.rand(3)
    with torch.no_grad():
        plain, mixed = model(x), model(x, psi, torch.tensor([0.0, 1.0, 0.0]))
        assert torch.equal(plain, model(x, psi, torch.zeros(3)))
    assert_close("plain rows", mixed[::2], plain[::2])
    assert (mixed[1] - plain[1]).abs().max() > 1e-3


def test_a_plain_vim_refuses_mixing():
    model = Vim(**NANO)
    with pytest.raises(ValueError, match="built without ssmixup_c"):
        model(torch.randn(1, 3, 64, 64), torch.ones(1), torch.ones(1))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"ssmixup_layers": 1}, "ssmixup_layers is 1, wanted None without ssmixup_c"),
        ({"ssmixup_c": "own", "ssmixup_layers": 4}, "wanted 1 to 3"),
        ({"ssmixup_c": "own", "ssmixup_layers": 0}, "wanted 1 to 3"),
        ({"ssmixup_c": "all"}, "ssmixup_c is 'all'"),
        ({"global_pool": "max"}, "global_pool is 'max'"),
    ],
)
def test_contradicting_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Vim(**NANO, **kwargs)


def test_average_pooling_leaves_the_class_token_out():
    model = Vim(**NANO, global_pool="avg").eval()
    tokens = torch.randn(2, 17, 32)
    patches = torch.cat([tokens[:, :8], tokens[:, 9:]], 1)
    assert_close("features", model.forward_head(tokens, pre_logits=True), patches.mean(1))


def test_rectangular_input():
    model = Vim(**{**NANO, "img_size": (64, 96)}).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
    assert final.shape == (1, 25, 32) and maps[0].shape == (1, 32, 4, 6)
    # Row-major patches around the class token in slot 12.
    with torch.no_grad():
        tokens = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)[0]
        assert torch.equal(maps[0].flatten(2).transpose(1, 2), tokens)
        full = model.blocks[0](model._embed(x))
    assert torch.equal(tokens[:, :12], full[:, :12]) and torch.equal(tokens[:, 12:], full[:, 13:])


@pytest.mark.parametrize("patch_stride", [None, 8])
def test_any_size_equals_resizing_the_model(patch_stride):
    torch.manual_seed(3)
    free = Vim(**NANO, patch_stride=patch_stride, dynamic_img_size=True).eval()
    fixed = Vim(**NANO, patch_stride=patch_stride).eval()
    fixed.load_state_dict(free.state_dict())
    fixed.set_input_size((32, 80))
    x = torch.randn(2, 3, 32, 80)
    with torch.no_grad():
        assert_close("logits", free(x), fixed(x))
        with pytest.raises(AssertionError, match="doesn't match model"):
            fixed(torch.randn(2, 3, 64, 64))


def test_checkpointing_changes_nothing():
    model = timm.create_model("test_vim")
    x, psi, nu = torch.randn(2, 3, 32, 32), torch.rand(2), torch.ones(2)
    plain = torch.autograd.grad(model(x, psi, nu).sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    saved = torch.autograd.grad(model(x, psi, nu).sum(), list(model.parameters()))
    for (name, _), a, b in zip(model.named_parameters(), saved, plain, strict=True):
        assert torch.equal(a, b), name
