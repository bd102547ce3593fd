"""What timm, its scripts and its clients ask of a model: structure for every name, behaviour for the small ones."""

import copy
import fnmatch
import math

import pytest
import segmentation_models_pytorch
import timm
import torch
from timm.layers import get_notrace_functions, get_notrace_modules, set_scriptable
from timm.models import get_model_input_config, group_parameters, save_for_hf
from timm.optim import create_optimizer_v2
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from semivim.models import list_models
from semivim.ops import use_backend
from tests.tolerance import assert_close

NAMES = list_models()
SMALL = ["test_vim", "semivim_pico"]
# Another read-out; a patch grid of unequal sides, with the class token in the middle of an odd number of patches.
VARIANTS = [{}, {"ssmixup_c": "mean"}, {"patch_size": 16, "patch_stride": 8, "img_size": (48, 32)}]


def build(name="test_vim", **kwargs):
    return timm.create_model(name, **kwargs)


def image(model, batch=2):
    return torch.randn(batch, *get_model_input_config(model)["input_size"])


def test_every_model_is_registered():
    assert set(NAMES) == {
        *("vim_tiny_patch16_224", "vim_small_patch16_224", "vim_base_patch16_224"),
        *("vim_tiny_patch16_stride8_224", "vim_small_patch16_stride8_224"),
        *("semivim_tiny", "semivim_small", "semivim_base", "semivim_pico", "test_vim"),
    }


@pytest.mark.parametrize("name", NAMES)
def test_structure_on_the_meta_device(name):
    model = build(name, device="meta", dtype=torch.float32).eval()
    tensors = [*model.parameters(), *model.buffers()]
    assert all(t.device.type == "meta" for t in tensors)
    with pytest.raises(TypeError):
        build(name, device="meta", no_such_word=1)

    cfg = model.pretrained_cfg
    assert model.in_chans == cfg["input_size"][0] == 3
    assert {f"{cfg['classifier']}.weight", f"{cfg['first_conv']}.weight"} <= model.state_dict().keys()
    x = torch.randn(2, *cfg["input_size"], device="meta")
    tokens = model.forward_features(x)
    assert tokens.shape == (2, model.patch_embed.num_patches + 1, model.num_features)
    pre_logits = model.forward_head(tokens, pre_logits=True)
    assert pre_logits.shape == (2, model.head_hidden_size)
    assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    model.float().reset_classifier(0)
    assert model(x).shape == pre_logits.shape
    assert build(name, device="meta", num_classes=0)(x).shape == pre_logits.shape
    model.to(torch.float64).reset_classifier(7)
    assert model.head.weight.dtype == torch.float64 and model.head.weight.device.type == "meta"
    assert not model.head.training


@pytest.mark.parametrize("name", NAMES)
def test_frozen_stays_frozen_through_reset_and_resize(name):
    model = build(name, device="meta")
    model.requires_grad_(False)
    model.reset_classifier(0, "")
    model.set_input_size(tuple(2 * s for s in model.pretrained_cfg["input_size"][1:]))
    assert not any(p.requires_grad for p in model.parameters())
    assert model.pos_embed.shape[1] == model.patch_embed.num_patches + 1


@pytest.mark.parametrize("name", NAMES)
def test_parameter_groups(name):
    model = build(name, device="meta")
    names = [n for n, _ in model.named_parameters()]
    kept = {n for n in names if any(fnmatch.fnmatch(n, pattern) for pattern in model.no_weight_decay())}
    ends = ("pos_embed", "cls_token", ".A_log", ".A_b_log", ".D", ".D_b")
    assert kept == {n for n in names if n.endswith(ends)} and len(kept) == 2 + 4 * len(model.blocks)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    depth = len(model.blocks)
    assert groups["cls_token"] == groups["pos_embed"] == groups["patch_embed.proj.weight"] == 0
    assert groups["blocks.0.mixer.A_log"] == 1 and groups[f"blocks.{depth - 1}.norm.weight"] == depth
    # The final norm goes with the last block.
    assert groups["norm.weight"] == depth and groups["head.weight"] == depth + 1


def test_layer_decay_and_weight_decay_reach_the_optimizer():
    model = build()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    mixer = model.blocks[1].mixer
    for weight in (mixer.A_log, mixer.A_b_log, mixer.D, mixer.D_b, mixer.dt_proj.bias, model.pos_embed):
        assert of[id(weight)]["weight_decay"] == 0
    for weight in (mixer.in_proj.weight, mixer.conv1d.weight, mixer.x_proj_b.weight, model.head.weight):
        assert of[id(weight)]["weight_decay"] == 0.1
    scales = [of[id(w)]["lr_scale"] for w in (model.pos_embed, mixer.A_log, model.head.weight)]
    assert scales == pytest.approx([0.5**5, 0.5**3, 1.0])


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_every_parameter_gets_a_gradient(name, backend):
    model = build(name, num_classes=42, drop_path_rate=0.1).train()
    with use_backend(backend):
        logits = model(image(model))
        assert logits.shape == (2, 42)
        logits.mean().backward()
    for key, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.any(), key


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_input_channels(in_chans):
    model = build(in_chans=in_chans)
    assert model(image(model)).shape == (2, 1000)
    assert image(model).shape[1] == in_chans


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_torchscript(variant):
    with set_scriptable(True):
        model = build(**variant).eval()
    x, psi, nu = image(model), torch.rand(2), torch.rand(2)
    with pytest.warns(FutureWarning, match=r"torch\.jit\.script"):
        scripted = torch.jit.script(model)
    with torch.no_grad():
        assert torch.equal(scripted(x), model(x))
        assert torch.equal(scripted(x, psi, nu), model(x, psi, nu))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_symbolic_tracing(variant):
    model = build(**variant).eval()
    kwargs = {
        "leaf_modules": get_notrace_modules(),
        "autowrap_functions": get_notrace_functions(),
        "param_shapes_constant": True,
    }
    train_nodes, eval_nodes = get_graph_node_names(model, tracer_kwargs=kwargs)
    traced = create_feature_extractor(
        model, train_return_nodes=[train_nodes[-1]], eval_return_nodes=[eval_nodes[-1]], tracer_kwargs=kwargs
    )
    x = image(model)
    with torch.no_grad():
        assert torch.equal(traced(x)[eval_nodes[-1]], model(x))
    traced.train()
    traced(x)[train_nodes[-1]].mean().backward()
    assert all(p.grad is not None for p in traced.parameters())
    with pytest.warns(FutureWarning, match=r"torch\.jit\.script"), torch.no_grad():
        scripted = torch.jit.script(traced.eval())
        assert torch.equal(scripted(x)[eval_nodes[-1]], model(x))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_intermediates(variant):
    model = build(**variant).eval()
    x = image(model)
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        assert_close("final", final, model.forward_features(x))
        assert len(maps) == len(model.feature_info) == 4
        rows, columns = model.patch_embed.grid_size
        assert all(
            m.shape == (2, info["num_chs"], rows, columns) and m.is_contiguous()
            for m, info in zip(maps, model.feature_info, strict=True)
        )
        normed = model.forward_intermediates(x, indices=[-1], norm=True, output_fmt="NLC", intermediates_only=True)[0]
        middle = rows * columns // 2
        patches = torch.cat([final[:, :middle], final[:, middle + 1 :]], 1)
        pairs = model.forward_intermediates(x, indices=1, norm=True, return_prefix_tokens=True)[1]
        assert_close("class token", pairs[0][1], final[:, middle : middle + 1])
        assert_close("normed", normed, patches)
        model.set_grad_checkpointing()
    assert_close("checkpointed", model.forward_intermediates(x)[0], final)
    with pytest.raises(ValueError, match="output_fmt is 'NHWC'"):
        model.forward_intermediates(x, output_fmt="NHWC")


@pytest.mark.parametrize("name", SMALL)
def test_pruning_keeps_the_taps_and_leaves_nothing_unused(name):
    model = build(name).eval()
    x = image(model)
    last = len(model.feature_info) - 1
    with torch.no_grad():
        taps = model.forward_intermediates(x, intermediates_only=True)
        whole = copy.deepcopy(model)
        whole.prune_intermediate_layers([last], prune_head=False)
        assert torch.equal(whole(x), model(x))
    for index, prune_norm in ((0, False), (last, False), (1, True)):
        with torch.no_grad():
            ran = []
            hooks = [block.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1)) for block in model.blocks]
            early = model.forward_intermediates(x, indices=[index], stop_early=True, intermediates_only=True)
            assert torch.equal(early[0], taps[index]) and len(ran) == index + 1
            for hook in hooks:
                hook.remove()
        pruned = copy.deepcopy(model)
        take = pruned.prune_intermediate_layers([index], prune_norm=prune_norm)
        assert isinstance(pruned.norm, nn.Identity) == prune_norm
        features, maps = pruned.forward_intermediates(x, indices=take)
        assert torch.equal(maps[0], taps[index])
        (features.sum() + maps[0].sum()).backward()
        assert not [key for key, p in pruned.named_parameters() if p.grad is None]
        assert pruned(x).shape == (2, model.patch_embed.num_patches + 1, model.embed_dim)


def test_features_only():
    model = timm.create_model("test_vim", features_only=True, out_indices=(1, 3), img_size=64)
    assert model.feature_info.channels() == [32, 32] and model.feature_info.reduction() == [8, 8]
    assert [f.shape for f in model(torch.randn(2, 3, 64, 64))] == [(2, 32, 8, 8)] * 2
    assert len(timm.create_model("test_vim", features_only=True)(torch.randn(1, 3, 32, 32))) == 3


@pytest.mark.parametrize("reset", [(7, None), (0, ""), (3, "avg"), (0, "token")])
def test_resize_and_head_survive_saving(tmp_path, reset):
    model = build(num_classes=5, patch_size=4, drop_path_rate=0.3).eval()
    model.set_input_size((48, 24), patch_size=8)
    model.reset_classifier(*reset)
    save_for_hf(model, tmp_path, safe_serialization=True)
    restored = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert get_model_input_config(restored)["input_size"] == (3, 48, 24)
    with torch.no_grad():
        x = image(model)
        assert torch.equal(restored(x), model(x))


def test_a_saved_model_loads_at_another_size_and_number_of_classes(tmp_path):
    model = build(img_size=(32, 64))
    with torch.no_grad():
        model.pos_embed.zero_()[:, 16] = 3.0
    save_for_hf(model, tmp_path, safe_serialization=True)
    restored = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=(64, 64), num_classes=2, in_chans=1)
    assert restored.pos_embed[0, 32].eq(3).all() and restored.pos_embed.count_nonzero() == 32
    assert restored(torch.randn(1, 1, 64, 64)).shape == (1, 2)
    assert_close("stem", restored.patch_embed.proj.weight, model.patch_embed.proj.weight.sum(1, keepdim=True))


def test_weights_after_to_empty_are_all_drawn_again():
    model = build(device="meta", dtype=torch.float64).to_empty(device="cpu").eval()
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(math.nan)
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())
    limit = 1 / math.sqrt(64 * len(model.blocks))
    assert 0.9 * limit < model.blocks[0].mixer.out_proj.weight.abs().max() <= limit
    assert model(torch.randn(1, 3, 32, 32, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize("variant", [{}, {"dynamic_img_size": True}], ids=str)
def test_segmentation_models_trains_on_our_features(variant):
    """A dense prediction transformer on maps and class tokens of our blocks: a few steps lower the loss."""
    model = segmentation_models_pytorch.DPT(
        "tu-test_vim",
        encoder_weights=None,
        decoder_intermediate_channels=(8, 8, 8, 8),
        decoder_fusion_channels=8,
        classes=2,
        **variant,
    )
    size = 64 if variant else 32
    x = torch.randn(2, 3, size, size)
    target = (x.mean(1) > 0).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(model(x), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[0]
    assert all(p.grad is not None for p in model.encoder.model.blocks.parameters())
