import pytest
import timm
import torch

from semivim.models import Vim
from semivim.models.vim_weights import checkpoint_filter_fn
from tests.tolerance import assert_close

SMALL = {"embed_dim": 16, "depth": 2, "num_classes": 5}


def released(model: Vim) -> dict[str, torch.Tensor]:
    """The model's weights in the names and the order of the release: the head before the layers."""
    state = {k.replace("blocks.", "layers."): v for k, v in model.state_dict().items()}
    state["norm_f.weight"] = state.pop("norm.weight")
    return dict(sorted(state.items(), key=lambda item: item[0].startswith(("layers.", "norm_f."))))


@pytest.fixture
def model():
    return Vim(img_size=64, **SMALL)


def test_released_names_and_containers_are_mapped(model):
    ema = {k: v + 1 for k, v in released(model).items()}
    training_state = {"model": released(model), "model_ema": ema, "optimizer": {"state": {}}, "epoch": 3}
    wanted = model.state_dict()
    for state, shift in (
        (released(model), 0),
        (training_state, 0),
        ({f"module.{k}": v for k, v in released(model).items()}, 0),
        (dict(sorted(released(model).items())), 0),
        (model.state_dict(), 0),
    ):
        mapped = checkpoint_filter_fn(state, model)
        assert mapped.keys() == wanted.keys()
        assert all(torch.equal(mapped[k], wanted[k] + shift) for k in wanted)
    mapped = checkpoint_filter_fn(training_state, model, container="model_ema")
    assert all(torch.equal(mapped[k], wanted[k] + 1) for k in wanted)


def test_a_headless_checkpoint_is_accepted(model):
    state = {k: v for k, v in released(model).items() if not k.startswith("head")}
    assert set(model.state_dict()) - set(checkpoint_filter_fn(state, model)) == {"head.weight", "head.bias"}
    model.reset_classifier(0)
    checkpoint_filter_fn({**state, "head.weight": torch.zeros(5, 16)}, model)


def test_unknown_keys_are_named(model):
    state = {**released(model), "layers.0.mixer.gamma": torch.ones(16), "rope.freqs_cos": torch.ones(4)}
    with pytest.raises(ValueError, match=r"2 keys .*: blocks\.0\.mixer\.gamma, rope\.freqs_cos"):
        checkpoint_filter_fn(state, model)


def test_a_missing_container_is_named(model):
    with pytest.raises(ValueError, match=r"\['epoch', 'model'\], wanted 'model_ema'"):
        checkpoint_filter_fn({"model": released(model), "epoch": 1}, model, container="model_ema")


@pytest.mark.parametrize("target", [{"img_size": 64, "patch_stride": 8}, {"img_size": 96}, {"img_size": (32, 64)}])
def test_the_position_embedding_is_resampled_around_the_middle(model, target):
    with torch.no_grad():
        model.pos_embed.zero_()[:, 8] = 5.0
    other = Vim(**target, **SMALL)
    pos_embed = checkpoint_filter_fn(released(model), other)["pos_embed"]
    middle = other.patch_embed.num_patches // 2
    assert pos_embed.shape == other.pos_embed.shape
    assert pos_embed[:, middle].eq(5).all()
    assert pos_embed.count_nonzero() == 16


def test_a_rectangular_checkpoint_needs_its_size_or_the_same_grid():
    source, same = Vim(img_size=(64, 96), **SMALL), Vim(img_size=(64, 96), **SMALL)
    assert torch.equal(checkpoint_filter_fn(released(source), same)["pos_embed"], source.pos_embed)
    other = Vim(img_size=64, **SMALL)
    with pytest.raises(ValueError, match="24 patch positions"):
        checkpoint_filter_fn(released(source), other)
    other.pretrained_model_args = {"img_size": (64, 96)}
    assert checkpoint_filter_fn(released(source), other)["pos_embed"].shape == other.pos_embed.shape


def test_every_published_tag_says_where_it_comes_from():
    tags = timm.list_models(["vim_*", "semivim_*", "test_vim"], pretrained=True)
    assert len(tags) == 8
    for tag in tags:
        cfg = timm.get_pretrained_cfg(tag)
        assert cfg.hf_hub_id.startswith("hustvl/Vim-") and cfg.hf_hub_filename.endswith("acc.pth")
        assert cfg.license == "apache-2.0" and cfg.paper_ids == "arXiv:2401.09417" and cfg.origin_url
        assert (cfg.crop_pct, cfg.interpolation, cfg.mean[0]) == (0.875, "bicubic", 0.485)
        assert ("ft" in cfg.hf_hub_filename) == ("stride8" in tag)
        if tag.startswith("semivim"):
            assert "not semi-supervised" in cfg.description


def test_released_weights_give_the_same_logits_under_our_names(model):
    x = torch.randn(1, 3, 64, 64)
    other = Vim(img_size=64, **SMALL)
    other.load_state_dict(checkpoint_filter_fn(released(model), other))
    with torch.no_grad():
        assert_close("logits", other.eval()(x), model.eval()(x))
