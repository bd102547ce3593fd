import copy

import pytest
import timm
import torch
from torch import nn

import semivim
from semivim.layers import BidirectionalMamba, insert_middle, mamba, remove_middle
from semivim.models.arm_decoder import (
    ArmDecoder,
    ArmModel,
    CrossAttentionBlock,
    cluster_mask,
    cluster_order,
    copy_forward_direction,
    mixers,
    set_fixed_position,
    sincos_position,
    tap_blocks,
)
from semivim.ops import use_backend

BACKWARD = ("conv1d_b", "x_proj_b", "dt_proj_b", "A_b_log", "D_b")


def make_model(cluster=1, directions="forward", img_size=32, **options):
    """A model whose two directions differ."""
    torch.manual_seed(1)
    backbone = timm.create_model("test_vim", num_classes=0, img_size=img_size, in_chans=1, **options)
    model = ArmModel(backbone, cluster, directions, decoder_dim=32, decoder_depth=2).eval()
    set_fixed_position(model.backbone)
    return model


# Order


def test_order_of_the_reference_is_that_of_the_paper():
    order = cluster_order((12, 12), 4).tolist()
    assert order[:16] == [*range(4), *range(12, 16), *range(24, 28), *range(36, 40)]
    assert order[::16] == [0, 4, 8, 48, 52, 56, 96, 100, 104]
    for position, place in enumerate(order):
        rest, v = divmod(position, 4)
        rest, u = divmod(rest, 4)
        a, b = divmod(rest, 3)
        assert place == (a * 4 + u) * 12 + b * 4 + v


@pytest.mark.parametrize(("grid", "cluster"), [((12, 12), 4), ((4, 6), 2), ((3, 5), 1)])
def test_order_is_a_permutation_whose_inverse_restores_the_raster(grid, cluster):
    order = cluster_order(grid, cluster)
    assert sorted(order.tolist()) == list(range(grid[0] * grid[1]))
    patches = torch.randn(2, len(order), 3)
    assert torch.equal(patches[:, order][:, order.argsort()], patches)


@pytest.mark.parametrize(("grid", "cluster"), [((14, 14), 4), ((4, 4), 4), ((4, 6), 4), ((4, 4), 0), ((4, 4), -1)])
def test_clusters_that_do_not_fit_are_refused(grid, cluster):
    with pytest.raises(ValueError, match=rf"cluster is {cluster}, wanted a divisor of the grid {grid[0]} x {grid[1]}"):
        cluster_order(grid, cluster)


def test_position_embedding_is_maes():
    position = sincos_position((2, 3), 8).view(2, 3, 8)
    omega = torch.tensor([1.0, 10000 ** (-1 / 2)])
    for row in range(2):
        for column in range(3):
            parts = [f(place * omega) for place in (column, row) for f in (torch.sin, torch.cos)]
            torch.testing.assert_close(position[row, column], torch.cat(parts))
    with pytest.raises(ValueError, match="are 6, wanted a multiple of 4"):
        sincos_position((2, 3), 6)


def test_taps_are_arms_and_fit_any_depth():
    assert tap_blocks(12) == [6, 8, 10, 12]
    assert tap_blocks(24) == [12, 16, 20, 24]
    assert tap_blocks(1) == [1, 1, 1, 1]


# Causality


def seen(model, backward, predict=None):
    """Which predicted clusters (columns) a change of each cluster (rows) reaches, both in the order of the pass."""
    predict = predict or model.predict
    images = torch.randn(1, 1, *model.backbone.patch_embed.img_size)
    before, columns, p, m = predict(images, backward), model.grid[1], model.patch_size, model.cluster_size
    reached = []
    for cluster in range(model.num_clusters):
        row, column = divmod(int(model._positions(backward)[cluster * m + m // 2]), columns)
        changed = images.clone()
        changed[0, 0, row * p + 3, column * p + 2] += 30  # far tokens feel less than rounding takes
        reached.append((predict(changed, backward) != before)[0].unflatten(0, (-1, m)).flatten(1).any(1))
    return torch.stack(reached)


def wanted(model):
    n = model.num_clusters
    return torch.arange(n)[:, None] < torch.arange(1, n)[None, :]


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "ops"])
@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("cluster", [1, 2])
@torch.no_grad()
def test_a_cluster_reaches_all_later_predictions_and_no_other(cluster, backward, backend, direct, monkeypatch):
    if not direct:
        monkeypatch.setattr(mamba, "is_eager", lambda _: False)
    model = make_model(cluster, "both")
    with use_backend(backend):
        assert torch.equal(seen(model, backward), wanted(model))


@torch.no_grad()
def test_the_test_of_causality_finds_a_scan_in_both_directions(monkeypatch):
    """The negative control: with it, every cluster that is read reaches every prediction."""
    model = make_model()

    def both_directions(self, x, backward):
        return x + self.mixer(self.norm(x))

    monkeypatch.setattr(type(model.backbone.blocks[0]), "one_direction", both_directions)
    leaking = seen(model, False)
    assert not torch.equal(leaking, wanted(model))
    assert leaking[:-1].all() and not leaking[-1].any()


@torch.no_grad()
def test_one_leaking_block_is_found(monkeypatch):
    model = make_model()
    block = model.backbone.blocks[0]
    monkeypatch.setattr(block, "one_direction", lambda x, backward: block(x))
    assert seen(model, False)[:-1].all()


def test_gradients_flow_to_earlier_pixels_only():
    model = make_model(cluster=2)
    images = torch.randn(1, 1, 32, 32, requires_grad=True)
    prediction = model.predict(images, False).unflatten(1, (-1, 4))
    for k in range(1, 4):
        (gradient,) = torch.autograd.grad(prediction[:, k - 1].sum(), images, retain_graph=True)
        clusters = [gradient[0, 0, a : a + 16, b : b + 16] for a in (0, 16) for b in (0, 16)]
        assert all(not gradient.any() for gradient in clusters[k:])
        assert clusters[k - 1].any()


def test_mask_is_lower_triangular_in_blocks_with_the_diagonal():
    mask = cluster_mask(3, 2)
    assert mask.shape == (6, 6)
    assert torch.equal(mask, torch.ones(3, 3).tril().bool().repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert mask.any(1).all()


@torch.no_grad()
def test_a_query_ignores_the_features_of_later_blocks():
    decoder, mask = ArmDecoder(16, 12, dim=32, depth=2), cluster_mask(3, 2)
    taps = [torch.randn(2, 6, 16) for _ in range(4)]
    position = torch.randn(6, 32)
    before = decoder(taps, position, mask)
    for block in range(3):
        noisy = [torch.cat([x[:, : 2 * block + 2], torch.randn(2, 4 - 2 * block, 16)], 1) for x in taps]
        after = decoder(noisy, position, mask)
        assert torch.equal(after[:, : 2 * block + 2], before[:, : 2 * block + 2])
        assert block == 2 or not torch.equal(after[:, 2 * block + 2 :], before[:, 2 * block + 2 :])


# Wiring


@torch.no_grad()
def test_the_last_tap_is_the_residual_stream_of_the_backbone(monkeypatch):
    """Behind the final norm it is the backbone's own features, there without a class token and in one direction."""
    model = make_model(img_size=32)
    images = torch.randn(2, 1, 32, 32)
    (*_, last) = model.encode(images, False)
    backbone = copy.deepcopy(model.backbone)
    for block in backbone.blocks:
        monkeypatch.setattr(block, "forward", lambda x, psi, nu, block=block: block.one_direction(x, False))
    monkeypatch.setattr(backbone, "_embed", lambda x: type(backbone)._embed(backbone, x)[:, [*range(8), *range(9, 16)]])
    assert torch.equal(model.backbone.norm(last), backbone.forward_features(images))


@torch.no_grad()
def test_block_d_of_the_decoder_reads_channels_d_of_the_mix():
    decoder = ArmDecoder(16, 12, dim=32, depth=4)
    taps = [torch.randn(1, 6, 16) for _ in range(4)]
    before = decoder.features(taps)
    decoder.mix.weight[2::4].zero_()
    after = decoder.features(taps)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, False, True]
    levels = torch.cat([norm(x) for norm, x in zip(decoder.norms, taps, strict=True)], -1)
    assert torch.equal(before[1], decoder.mix(levels)[..., 1::4])


@torch.no_grad()
def test_cross_attention_equals_its_formula_and_takes_another_number_of_features():
    block = CrossAttentionBlock(8, 2)
    query, feature, mask = torch.randn(2, 5, 8), torch.randn(2, 7, 8), torch.rand(5, 7) > 0.3
    mask[:, 0] = True
    q = block.query(block.norm_query(query))
    k, v = block.key_value(block.norm_feature(feature)).split(8, -1)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        scores = q[..., head] @ k[..., head].transpose(1, 2) / 4**0.5
        heads.append(scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v[..., head])
    expected = query + block.proj(torch.cat(heads, -1))
    expected = expected + block.mlp(block.norm_mlp(expected))
    torch.testing.assert_close(block(query, feature, mask), expected)


@pytest.mark.parametrize("directions", ["forward", "both"])
def test_what_a_pass_can_train_has_a_gradient_and_nothing_else(directions):
    model = make_model(cluster=2, directions=directions)
    model(torch.randn(2, 1, 32, 32)).square().mean().backward()
    for name, parameter in model.named_parameters():
        frozen = name in ("backbone.cls_token", "backbone.pos_embed", "backbone.norm.weight") or (
            directions == "forward" and any(part in BACKWARD for part in name.split("."))
        )
        assert parameter.requires_grad is not frozen, name
        assert frozen == (parameter.grad is None), name
        assert frozen or parameter.grad.any(), name


@torch.no_grad()
def test_the_backward_pass_is_the_forward_pass_on_reversed_tokens():
    model = make_model(cluster=2, directions="both")
    copy_forward_direction(model.backbone)
    tokens = torch.randn(2, 12, 32)
    for block in model.backbone.blocks:
        assert torch.equal(block.one_direction(tokens, True), block.one_direction(tokens, False))
    # 180 degrees turn the order of clusters around
    monkey = torch.randn(1, 1, 32, 32)
    assert torch.equal(model.predicted_positions(True), 15 - model.predicted_positions(False))
    assert not torch.equal(model.predict(monkey, True), model.predict(monkey, False))


@torch.no_grad()
def test_a_copied_stack_turns_with_its_tokens():
    exported = make_model().export().eval()
    x = torch.randn(1, 16, 32)
    flipped = x.flip(1)
    for block in exported.blocks:
        x, flipped = block(x), block(flipped)
    torch.testing.assert_close(flipped.flip(1), x)


def test_both_gives_each_half_of_the_batch_its_pass():
    model = make_model(cluster=2, directions="both")
    images, patches = torch.randn(5, 1, 32, 32), torch.randn(5, 16, 64)
    with torch.no_grad():
        parts = [model.predict(images[:3], False), model.predict(images[3:], True)]
    torch.testing.assert_close(model(images), torch.cat(parts))
    targets = model.targets(patches)
    assert torch.equal(targets[0], patches[0, model.order[4:]])
    assert torch.equal(targets[4], patches[4, model.order.flip(0)[4:]])
    with pytest.raises(ValueError, match="a batch has 1 images, wanted two or more"):
        model(images[:1])


def test_checkpointed_gradients_are_the_same():
    model, images = make_model(cluster=2), torch.randn(2, 1, 32, 32)
    gradients = []
    for enable in (False, True):
        model.backbone.set_grad_checkpointing(enable)
        model.zero_grad()
        model.train()(images).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_nothing_of_the_other_direction_runs(monkeypatch):
    """Its layers are poisoned: a product or a scan with them would show."""
    model = make_model(cluster=2)
    with torch.no_grad():
        for mixer in mixers(model.backbone):
            for _, backward in mixer.twins():
                backward.fill_(torch.nan)
    loss = model(torch.randn(2, 1, 32, 32)).square().mean()
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# Export


@pytest.mark.parametrize("directions", ["forward", "both"])
def test_export_copies_the_direction_that_trained(directions):
    model = make_model(cluster=2, directions=directions)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    exported = model.export()
    for before, after in zip(mixers(model.backbone), mixers(exported), strict=True):
        for old, (forward, backward) in zip(before.twins(), after.twins(), strict=True):
            assert forward.data_ptr() != backward.data_ptr()
            assert torch.equal(old[0], forward) and not torch.equal(*old)
            assert torch.equal(backward, forward if directions == "forward" else old[1])
    assert all(p.requires_grad for p in exported.parameters())


def test_export_lacks_the_head_only():
    exported = make_model().export().state_dict()
    for classes in (3, 1000):
        classifier = timm.create_model("test_vim", num_classes=classes, in_chans=1)
        result = classifier.load_state_dict(exported, strict=False)
        assert set(result.missing_keys) == {"head.weight", "head.bias"}
        assert result.unexpected_keys == []
        assert torch.equal(classifier.blocks[2].mixer.x_proj_b.weight, exported["blocks.2.mixer.x_proj_b.weight"])


def test_a_training_checkpoint_keeps_the_decoder_apart():
    names = set(make_model().state_dict())
    assert {name.split(".")[0] for name in names} == {"backbone", "decoder"}
    backbone = {name.removeprefix("backbone.") for name in names if name.startswith("backbone.")}
    assert backbone == set(timm.create_model("test_vim", num_classes=0).state_dict())


def test_a_copied_direction_keeps_the_scale_of_the_output():
    """The mixer halves the sum of its directions: for one token, seen alike by both, that is the pretrained output."""
    model = make_model()
    exported, token = model.export(), torch.randn(2, 1, 32)
    for trained, block in zip(model.backbone.blocks, exported.blocks, strict=True):
        torch.testing.assert_close(block(token), trained.one_direction(token, False))


def test_class_token_has_no_position_and_patches_the_fixed_one():
    backbone = make_model().backbone
    patches, token = remove_middle(backbone.pos_embed)
    assert torch.equal(patches[0], sincos_position((4, 4), 32))
    assert not token.any()
    assert torch.equal(backbone.pos_embed, insert_middle(patches, token))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ArmModel(nn.Linear(1, 1)), "backbone is a Linear, wanted a Vim"),
        (lambda: ArmModel(timm.create_model("test_dyvm", num_classes=0)), "backbone is a DyVM, wanted a Vim"),
        (lambda: make_model(directions="backward"), "directions is 'backward', wanted one of forward, both"),
        (lambda: make_model(cluster=3), "cluster is 3, wanted a divisor of the grid 4 x 4"),
        (lambda: make_model(patch_stride=4), r"patches of \(8, 8\) pixels stand \(4, 4\) apart"),
        (lambda: ArmDecoder(16, 12, dim=164), "channels are 164, wanted a multiple of 64"),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_patches_and_grids_of_other_sizes():
    model = make_model(cluster=2, img_size=(32, 48))
    assert model.grid == (4, 6) and model.num_clusters == 6
    assert model(torch.randn(1, 1, 32, 48)).shape == (1, 20, 64)
    assert isinstance(model.backbone, semivim.Vim)
    assert all(isinstance(m, BidirectionalMamba) for m in mixers(model.backbone))
