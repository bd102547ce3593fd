import copy

import pytest
import timm
import torch

from semivim.layers import dynamic_mamba, token_router
from semivim.models import DyVM, Vim
from semivim.models.vim_weights import checkpoint_filter_fn
from semivim.ops import use_backend
from tests.dyvm_models import GOLDEN, MINI, build_mini, lively, load_golden, replay_noise
from tests.released import released_weights
from tests.tolerance import assert_close

NEW = (".block_head.", "score_predictors.")


@pytest.fixture(scope="module")
def golden():
    return load_golden()


@pytest.fixture
def mini(golden):
    return build_mini(golden)


@pytest.mark.parametrize(
    ("name", "num_params", "lengths"),
    [
        ("dyvm_tiny", 7_367_086, (176, 158, 142)),
        ("dyvm_small", 26_594_110, (137, 96, 67)),
        ("dyvm_base", 100_631_134, (137, 96, 67)),
        ("test_dyvm", 101_134, (11, 7, 5)),
    ],
)
def test_parameters_and_lengths(name, num_params, lengths):
    model = timm.create_model(name, device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) == num_params
    if name != "test_dyvm":
        assert len(model.state_dict()) == 493
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(out[0].shape[1] - 1))
    model(torch.empty(1, *model.pretrained_cfg["input_size"], device="meta"))
    m = model.patch_embed.num_patches
    wanted = [n for n in (m, *lengths) for _ in range(len(model.blocks) // 4)]
    assert seen == wanted


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("branches", [True, False])
def test_golden_evaluation(mini, golden, backend, branches, monkeypatch):
    """Computing what was chosen, and masking what was not, give the release's logits and decisions."""
    if not branches:
        monkeypatch.setattr(dynamic_mamba, "_may_branch", lambda x: False)
    recorded = golden["eval"]
    with torch.no_grad(), use_backend(backend):
        routed = mini(recorded["x"], return_decisions=True)
        assert torch.equal(mini(recorded["x"]), routed.logits)
    assert (routed.logits - recorded["logits"]).abs().max() <= 1e-5
    assert torch.equal(routed.gates, recorded["block_policy"].squeeze(2))
    place = torch.arange(49).expand(6, -1)
    for kept, index in zip(routed.kept, recorded["keep_idx"], strict=True):
        place = place.gather(1, index)
        assert torch.equal(kept.nonzero()[:, 1].view(6, -1), place)


def test_golden_scores(mini, golden):
    scores = []
    for router in mini.score_predictors:
        router.out_conv.register_forward_hook(lambda module, args, out: scores.append(out))
    with torch.no_grad():
        mini(golden["eval"]["x"])
    for i, (actual, expected) in enumerate(zip(scores, golden["eval"]["scores"], strict=True)):
        assert_close(f"scores {i}", actual, expected)


def test_golden_training_forward(mini, golden, monkeypatch):
    replay_noise(golden, monkeypatch)
    recorded = golden["train"]
    routed = mini.train()(golden["eval"]["x"], return_decisions=True)
    assert (routed.logits - recorded["logits"]).abs().max() <= 1e-5
    assert torch.equal(routed.gates, recorded["block_policy"].squeeze(2))
    patches = torch.cat([routed.tokens[:, :24], routed.tokens[:, 25:]], 1)
    place = recorded["current_pos"]
    assert_close("patches", patches.gather(1, place[..., None].expand(-1, -1, 32)), recorded["other"])
    assert torch.equal(routed.kept[2].gather(1, place), recorded["token_policy"].squeeze(2))
    for kept, decision in zip(routed.kept, recorded["pred_decisions"], strict=True):
        assert torch.equal(kept.sum(1), decision.sum(1))


def test_golden_without_routers():
    golden = torch.load(GOLDEN / "dyvm_mini_noprune.pt", weights_only=True)
    model = build_mini(golden, depth=4, pruning_loc=())
    with torch.no_grad():
        routed = model(golden["x"], return_decisions=True)
    assert (routed.logits - golden["logits"]).abs().max() <= 1e-5
    assert routed.kept.shape == (0, 2, 49)
    assert torch.equal(routed.gates, golden["block_policy"].squeeze(2))


def test_a_plain_vim_loads_and_gives_its_logits_where_nothing_is_dropped():
    sizes = {k: MINI[k] for k in ("img_size", "embed_dim", "depth", "num_classes")}
    vim, model = Vim(**sizes).eval(), DyVM(**MINI).eval()
    wanted = [k for k in model.state_dict() if any(part in k for part in NEW)]
    for state in (vim.state_dict(), released_weights(vim), {"model": released_weights(vim), "epoch": 1}):
        with torch.no_grad():
            model.pos_embed.zero_()
        assert model.load_vim(state) == wanted and len(wanted) == 8 * 2 + 3 * 10
        assert torch.equal(model.pos_embed, vim.pos_embed)
    model.set_token_ratio(1.0)
    x = torch.randn(3, 3, 112, 112)
    with torch.no_grad():
        assert_close("logits", model(x), vim(x))
        assert model(x, return_decisions=True).gates.all()


def test_what_is_no_plain_vim_is_refused():
    model = DyVM(**MINI)
    with pytest.raises(ValueError, match="other keys than a plain Vim"):
        model.load_vim(model.state_dict())
    state = Vim(img_size=112, embed_dim=32, depth=7, num_classes=10).state_dict()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="other keys than a plain Vim: blocks.7"):
        model.load_vim(state)
    for options, message in (
        ({"embed_dim": 48}, r"cls_token has shape \(1, 1, 48\), wanted \(1, 1, 32\)"),
        ({"num_classes": 7}, r"head.weight has shape \(7, 32\), wanted \(10, 32\)"),
    ):
        sizes = {"img_size": 112, "embed_dim": 32, "depth": 8, "num_classes": 10} | options
        with pytest.raises(ValueError, match=message):
            model.load_vim(Vim(**sizes).state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_released_names_are_mapped(golden, mini):
    assert any(k.startswith("layers.0.mixer.block_head") for k in golden["state_dict"])
    mapped = checkpoint_filter_fn({"model": golden["state_dict"], "model_ema": {}, "epoch": 29}, mini)
    assert mapped.keys() == mini.state_dict().keys()


def test_an_image_does_not_depend_on_its_batch():
    model, x = lively(), torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(x, return_decisions=True)
        one = [model(image[None], return_decisions=True) for image in x]
    chosen = {tuple(gates.tolist()) for block in whole.gates for gates in block}
    assert len(chosen) == 4, "the images must differ"
    for i, alone in enumerate(one):
        assert torch.equal(alone.gates[:, 0], whole.gates[:, i]) and torch.equal(alone.kept[:, 0], whole.kept[:, i])
    assert_close("logits", torch.cat([alone.logits for alone in one]), whole.logits)


def test_set_token_ratio_takes_effect_and_is_saved(tmp_path):
    model, x = lively(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for ratio, wanted in ((0.5, [8, 4, 2]), (0.9, [14, 12, 11]), (1.0, [16, 16, 16]), (0.05, [0, 0, 0])):
            model.set_token_ratio(ratio)
            routed = model(x, return_decisions=True)
            assert routed.kept.sum(-1)[:, 0].tolist() == wanted
            assert routed.logits.isfinite().all()
        model.set_token_ratio(0.5)
        timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
        restored = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert restored.token_ratio == 0.5 and torch.equal(restored(x), model(x))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"token_ratio": 0.0}, r"token_ratio is 0.0, wanted a share in \(0, 1\]"),
        ({"token_ratio": 1.5}, "token_ratio is 1.5"),
        ({"block_keep_ratio": -1}, "block_keep_ratio is -1"),
        ({"pruning_loc": (2, 2)}, r"pruning_loc is \(2, 2\), wanted rising numbers from 1 to 7"),
        ({"pruning_loc": (0,)}, "wanted rising numbers from 1"),
        ({"pruning_loc": (8,)}, "wanted rising numbers from 1 to 7"),
        ({"ssmixup_c": "own"}, "ssmixup_c is 'own', wanted None"),
    ],
)
def test_contradicting_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DyVM(**MINI | kwargs)


@pytest.mark.parametrize("training", [False, True])
def test_dropped_patches_keep_the_value_with_which_they_left(training):
    model, x = lively().train(training), torch.randn(3, 3, 32, 32)
    for block in model.blocks:
        torch.nn.init.constant_(block.mixer.block_head.bias, 1e3)  # every direction on
    torch.manual_seed(0)
    _, maps = model.forward_intermediates(x, output_fmt="NLC")
    torch.manual_seed(0)
    kept = model(x, return_decisions=True).kept
    for before, after, mask in zip(maps[:-1], maps[1:], kept, strict=True):
        dropped = mask < 0.5
        assert dropped.any() and torch.equal(before[dropped], after[dropped])
        assert not torch.equal(before[~dropped], after[~dropped])


def test_a_training_pass_equals_an_evaluation_of_what_it_kept(monkeypatch):
    """Padded and masked, or gathered: the same logits, if both keep the same number of patches and choose alike."""
    model, x = lively(), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        gathered = model(x, return_decisions=True)
        monkeypatch.setattr(dynamic_mamba, "gumbel_like", torch.zeros_like)

        def keep_the_same(tokens, log_probs):
            wanted = gathered.kept[keep_the_same.calls]
            keep_the_same.calls += 1
            place = torch.arange(16).expand(4, -1) if tokens.place is None else tokens.place
            wanted = wanted.gather(1, place)[..., None]
            return original(tokens, torch.cat([wanted, 1 - wanted], -1) * 1e4)

        keep_the_same.calls = 0
        original = token_router.keep_drawn
        monkeypatch.setattr(token_router, "keep_drawn", keep_the_same)
        masked = model.train()(x, return_decisions=True)
    assert torch.equal(masked.kept, gathered.kept) and torch.equal(masked.gates, gathered.gates)
    assert_close("logits", masked.logits, gathered.logits)
    assert_close("tokens", masked.tokens, gathered.tokens)


def test_checkpointing_changes_nothing_in_training():
    model, x = lively().train(), torch.randn(2, 3, 32, 32)
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(4)
        results.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
    for (name, _), a, b in zip(model.named_parameters(), *results, strict=True):
        assert torch.equal(a, b), name
