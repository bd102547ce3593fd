import copy

import pytest
import timm
import torch

from semivim.layers import resample_pos_embed
from semivim.models import Vim
from semivim.models.vim_weights import checkpoint_filter_fn
from tests.hub_client import shared_client, shared_hub
from tests.released import as_bytes, released_state, released_weights
from tests.tolerance import assert_close

SMALL = {"embed_dim": 16, "depth": 2, "num_classes": 5}


@pytest.fixture
def model():
    return Vim(img_size=64, **SMALL)


def test_released_names_and_containers_are_mapped(model):
    ema = {k: v + 1 for k, v in released_weights(model).items()}
    training_state = {"model": released_weights(model), "model_ema": ema, "optimizer": {"state": {}}, "epoch": 3}
    wanted = model.state_dict()
    for state, shift in (
        (released_weights(model), 0),
        (training_state, 0),
        ({f"module.{k}": v for k, v in released_weights(model).items()}, 0),
        (dict(sorted(released_weights(model).items())), 0),
        (model.state_dict(), 0),
    ):
        mapped = checkpoint_filter_fn(state, model)
        assert mapped.keys() == wanted.keys()
        assert all(torch.equal(mapped[k], wanted[k] + shift) for k in wanted)
    mapped = checkpoint_filter_fn(training_state, model, container="model_ema")
    assert all(torch.equal(mapped[k], wanted[k] + 1) for k in wanted)


def test_a_headless_checkpoint_is_accepted(model):
    state = {k: v for k, v in released_weights(model).items() if not k.startswith("head")}
    assert set(model.state_dict()) - set(checkpoint_filter_fn(state, model)) == {"head.weight", "head.bias"}
    model.reset_classifier(0)
    checkpoint_filter_fn({**state, "head.weight": torch.zeros(5, 16)}, model)


def test_unknown_keys_are_named(model):
    state = {**released_weights(model), "layers.0.mixer.gamma": torch.ones(16), "rope.layers.cos": torch.ones(4)}
    with pytest.raises(ValueError, match=r"2 keys .*: blocks\.0\.mixer\.gamma, rope\.layers\.cos"):
        checkpoint_filter_fn(state, model)


def test_a_missing_container_is_named(model):
    with pytest.raises(ValueError, match="entries model, epoch, wanted 'model_ema'"):
        checkpoint_filter_fn({"model": released_weights(model), "epoch": 1}, model, container="model_ema")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"model": 3}, "model: wanted a dict of tensors, got int"),
        ({"model": [torch.ones(1)]}, "model: wanted a dict of tensors, got list"),
        ({"model": {"norm.weight": torch.ones(16), "pos_embed": "x"}}, "model: wanted .* got str under 'pos_embed'"),
        ({1: torch.ones(1)}, "checkpoint: wanted tensors by name, got Tensor under 1"),
        ({"norm.weight": torch.ones(16, dtype=torch.int8)}, "norm.weight is of torch.int8, wanted floating point"),
        ({"pos_embed": torch.ones(1, 1, 16)}, r"pos_embed has shape \(1, 1, 16\), wanted \(1, patches \+ 1, 16\)"),
        ({"pos_embed": torch.ones(17)}, r"pos_embed has shape \(17,\), wanted \(1, patches \+ 1, 16\)"),
    ],
)
def test_what_are_no_weights_is_named(model, state, message):
    with pytest.raises(ValueError, match=message):
        checkpoint_filter_fn(state, model)


@pytest.mark.parametrize("target", [{"img_size": 64, "patch_stride": 8}, {"img_size": 96}, {"img_size": (32, 64)}])
def test_the_position_embedding_is_resampled_around_the_middle(model, target):
    with torch.no_grad():
        model.pos_embed.zero_()[:, 8] = 5.0
    other = Vim(**target, **SMALL)
    pos_embed = checkpoint_filter_fn(released_weights(model), other)["pos_embed"]
    middle = other.patch_embed.num_patches // 2
    assert pos_embed.shape == other.pos_embed.shape
    assert pos_embed[:, middle].eq(5).all()
    assert pos_embed.count_nonzero() == 16


def test_a_rectangular_checkpoint_needs_its_size_or_the_same_grid():
    source, same = Vim(img_size=(64, 96), **SMALL), Vim(img_size=(64, 96), **SMALL)
    assert torch.equal(checkpoint_filter_fn(released_weights(source), same)["pos_embed"], source.pos_embed)
    other = Vim(img_size=64, **SMALL)
    with pytest.raises(ValueError, match="24 patch positions"):
        checkpoint_filter_fn(released_weights(source), other)
    other.pretrained_model_args = {"img_size": (64, 96)}
    assert checkpoint_filter_fn(released_weights(source), other)["pos_embed"].shape == other.pos_embed.shape


def test_the_recorded_size_goes_before_the_same_grid_and_that_before_a_square():
    """16 patches fit all three: 2 x 8 where the checkpoint says so, else the model's own grid, 4 x 4 last of all."""
    wide, tall, square = (Vim(img_size=size, **SMALL) for size in ((32, 128), (128, 32), (64, 64)))
    weights = {"pos_embed": wide.pos_embed, "cls_token": wide.cls_token}

    def mapped(model):
        return checkpoint_filter_fn(weights, model)["pos_embed"]

    assert torch.equal(mapped(wide), wide.pos_embed)
    assert torch.equal(mapped(tall), wide.pos_embed)
    for model in (tall, square):
        model.pretrained_model_args = {"img_size": (32, 128)}
        wanted = resample_pos_embed(wide.pos_embed, model.patch_embed.grid_size, (2, 8))
        assert torch.equal(mapped(model), wanted) and not torch.equal(wanted, wide.pos_embed)
    bigger = Vim(img_size=128, **SMALL)
    assert torch.equal(mapped(bigger), resample_pos_embed(wide.pos_embed, (8, 8), (4, 4)))


def test_every_published_tag_says_where_it_comes_from():
    tags = timm.list_models(["vim_*", "semivim_*", "test_vim"], pretrained=True)
    assert len(tags) == 8
    for tag in tags:
        cfg = timm.get_pretrained_cfg(tag)
        assert cfg.hf_hub_id.startswith("hustvl/Vim-") and cfg.hf_hub_filename.endswith("acc.pth")
        assert cfg.license == "apache-2.0" and cfg.paper_ids == "arXiv:2401.09417" and cfg.origin_url
        assert (cfg.crop_pct, cfg.interpolation, cfg.mean[0], cfg.std[0]) == (0.875, "bicubic", 0.485, 0.229)
        assert ("ft" in cfg.hf_hub_filename) == ("stride8" in tag)
        if tag.startswith("semivim"):
            assert "not semi-supervised" in cfg.description


def test_released_weights_give_the_same_logits_under_our_names(model):
    x = torch.randn(1, 3, 64, 64)
    other = Vim(img_size=64, **SMALL)
    other.load_state_dict(checkpoint_filter_fn(released_weights(model), other))
    with torch.no_grad():
        assert_close("logits", other.eval()(x), model.eval()(x))


LOAD = """
import timm, torch
model = timm.create_model(name, pretrained=True, **kwargs).eval()
with torch.no_grad():
    result = model(torch.linspace(-1, 1, 3 * size * size).view(1, 3, size, size)).flatten().tolist()
"""


@pytest.mark.parametrize(
    "tag",
    [
        "vim_tiny_patch16_224.hustvl_in1k",
        "vim_tiny_patch16_stride8_224.hustvl_ft_in1k",
        "vim_base_patch16_224.hustvl_in1k",
        "semivim_small.vim_in1k",
        "semivim_base.vim_in1k",
    ],
)
def test_pretrained_reads_the_release_over_http(tag):
    """Whole training states in the published layout, under the published names, on a local Hub; small weights."""
    cfg = timm.get_pretrained_cfg(tag)
    kwargs = {"embed_dim": 16, "depth": 2, "num_classes": 1000}
    size, published = 224, 1 if "base" in tag else 0
    torch.manual_seed(7)
    stride = {"patch_stride": 8} if "stride8" in tag else {}
    sources = [Vim(**kwargs, **stride).eval() for _ in range(2)]
    shared_hub().add(cfg.hf_hub_id, {cfg.hf_hub_filename: as_bytes(released_state(*sources))})
    answer = shared_client().run(LOAD, name=tag, kwargs=kwargs, size=size)
    assert not answer.error, answer.stderr
    x = torch.linspace(-1, 1, 3 * size * size).view(1, 3, size, size)
    with torch.no_grad():
        assert_close("logits", torch.tensor(answer.result), sources[published](x).flatten())


@pytest.mark.slow
def test_pretrained_reads_the_whole_tiny_model_and_fine_tunes_it_at_another_size():
    """The real sizes: 7.1 M parameters four times over, 110 MB; other classes, channels and input size."""
    torch.manual_seed(8)
    name = "vim_tiny_patch16_224"
    source = timm.create_model(name)
    with torch.no_grad():
        source.pos_embed.zero_()[:, 98] = 2.0
    cfg = timm.get_pretrained_cfg(name)
    file = as_bytes(released_state(source, copy.deepcopy(source)))
    assert abs(len(file) / 2**20 - 109.7) < 1
    shared_hub().add(cfg.hf_hub_id, {cfg.hf_hub_filename: file})
    code = """
import timm
model = timm.create_model(name, pretrained=True, num_classes=7, in_chans=1, img_size=128)
marked = model.pos_embed[0, :, 0].nonzero().flatten().tolist()
stem = model.patch_embed.proj.weight[0, 0, 0].tolist()
result = [marked, model.head.weight.shape[0], stem]
"""
    answer = shared_client().run(code, name=name)
    assert not answer.error, answer.stderr
    marked, num_classes, stem = answer.result
    assert (marked, num_classes) == ([32], 7)
    assert_close("stem", torch.tensor(stem), source.patch_embed.proj.weight[0, :, 0].sum(0))


def test_a_published_file_on_disk_is_read_too(tmp_path):
    """timm itself picks the EMA of a local training state."""
    kwargs = {"img_size": 64, **SMALL}
    sources = [Vim(**kwargs) for _ in range(2)]
    path = tmp_path / "published.pth"
    path.write_bytes(as_bytes(released_state(*sources)))
    overlay = {"file": str(path), "num_classes": 5}
    model = timm.create_model("vim_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    assert all(torch.equal(value, sources[1].state_dict()[key]) for key, value in model.state_dict().items())


def test_weights_without_a_classifier_load_and_leave_the_head(model):
    weights = {name: torch.randn_like(w) for name, w in model.state_dict().items() if not name.startswith("head.")}
    head = model.head.weight.clone()
    result = model.load_state_dict(weights)
    assert (set(result.missing_keys), result.unexpected_keys) == ({"head.weight", "head.bias"}, [])
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.blocks[0].mixer.D, weights["blocks.0.mixer.D"])


@pytest.mark.parametrize("change", ["lacks", "has more"])
def test_weights_without_a_classifier_must_hold_everything_else_and_nothing_more(change, model):
    weights = {name: w for name, w in model.state_dict().items() if not name.startswith("head.")}
    named = "odd" if change == "has more" else "blocks.0.mixer.D"
    if change == "has more":
        weights[named] = torch.zeros(1)
    else:
        del weights[named]
    with pytest.raises(RuntimeError, match=f"by 1 names, such as {named}"):
        model.load_state_dict(weights)
    model.load_state_dict(weights, strict=False)


def test_half_a_classifier_is_refused(model):
    weights = model.state_dict()
    del weights["head.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"head.bias\""):
        model.load_state_dict(weights)


def test_a_position_embedding_of_another_grid_is_resampled_around_the_class_token():
    source, target = Vim(img_size=192, **SMALL), Vim(img_size=224, **SMALL)
    target.load_state_dict(source.state_dict())
    pos_embed = source.pos_embed.detach()
    patches = torch.cat([pos_embed[:, :72], pos_embed[:, 73:]], 1).reshape(1, 12, 12, -1).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(patches, (14, 14), mode="bicubic", antialias=True).flatten(2).mT
    assert torch.equal(target.pos_embed[:, 98], pos_embed[:, 72])
    torch.testing.assert_close(target.pos_embed[:, [*range(98), *range(99, 197)]], wanted)
    same = Vim(img_size=192, **SMALL)
    same.load_state_dict(source.state_dict())
    assert torch.equal(same.pos_embed, source.pos_embed)
