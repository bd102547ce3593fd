from pathlib import Path

import pytest
import segmentation_models_pytorch
import timm
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork

import train_ssl
from semivim.layers import SS2D
from semivim.models import VMamba
from semivim.models.vmamba import Downsample
from semivim.models.vmamba_weights import checkpoint_filter_fn
from semivim.ops import use_backend
from semivim.task.semi_supervised import METHODS
from tests.ops.triton_runs import interpreted, run_in_interpreter
from tests.tolerance import assert_close, sampled
from tests.training import states

GOLDEN = Path(__file__).parents[1] / "golden"
MINI = {"depths": (1, 1, 2, 1), "embed_dim": 16, "num_classes": 10}
OPTIONS = {
    "s1": {"ssm_ratio": 1},
    "v0": {"ssm_ratio": 2, "d_state": 16, "mlp_ratio": 0, "vanilla": True},
}


def mini(name):
    golden = torch.load(GOLDEN / f"vmamba_mini_{name}.pt", weights_only=True)
    model = VMamba(**MINI, **OPTIONS[name]).eval()
    model.load_state_dict(checkpoint_filter_fn(golden["state_dict"], model))
    return model, golden


@pytest.fixture(params=["reference", "numba"])
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize(
    ("name", "num_params", "num_tensors"),
    [
        ("vanilla_vmamba_tiny", 22_893_448, 212),
        ("vanilla_vmamba_small", 44_417_416, 446),
        ("vanilla_vmamba_base", 76_254_056, 446),
        ("vmamba_tiny_s2l5", 30_705_832, 222),
        ("vmamba_small_s2l15", 50_147_752, 402),
        ("vmamba_base_s2l15", 88_557_800, 402),
        ("vmamba_tiny_s1l8", 30_249_064, 276),
        ("vmamba_small_s1l20", 49_012_840, 492),
        ("vmamba_base_s1l20", 86_614_504, 492),
        ("test_vmamba", 119_040, 96),
    ],
)
def test_parameter_counts(name, num_params, num_tensors):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == num_params
    assert len(model.state_dict()) == num_tensors


def check_gradients(model, golden):
    """Compare the gradients of all weights that have one with the recorded ones."""
    released_names = dict(zip(checkpoint_filter_fn(golden["state_dict"], model), golden["state_dict"], strict=True))
    for key, weight in model.named_parameters():
        if weight.grad is not None:
            released = released_names[key]
            assert_close(key, sampled(weight.grad), golden["grads"][released].flatten(), "float32_grad")
            assert_close(f"norm of {key}", weight.grad.norm(), golden["grad_norms"][released], "float32_grad")


@pytest.mark.parametrize("name", OPTIONS)
def test_golden_logits_features_and_gradients(name, backend):
    model, golden = mini(name)
    x = golden["x"].requires_grad_()
    logits, features = model(x), model.forward_intermediates(x, intermediates_only=True)
    assert_close("logits", logits, golden["logits"])
    for i, (actual, expected) in enumerate(zip(features, golden["features"], strict=True)):
        assert_close(f"feature {i}", actual, expected)
    (logits * golden["grad_w"]).sum().backward()
    assert_close("x", x.grad, golden["x_grad"], "float32_grad")
    check_gradients(model, golden)


def test_golden_features_of_wide_maps(backend):
    """Rows and columns cannot be taken for each other, nor channels outside the scans for those inside."""
    golden = torch.load(GOLDEN / "vmamba_mini_s2.pt", weights_only=True)
    model = VMamba(**MINI, ssm_ratio=2).eval()
    model.prune_intermediate_layers([0, 1])
    model.load_state_dict(checkpoint_filter_fn(golden["state_dict"], model))
    with torch.no_grad():
        features = model.forward_intermediates(golden["x"], intermediates_only=True)
    for i, (actual, expected) in enumerate(zip(features, golden["features"], strict=True)):
        assert actual.shape[3] == 1.5 * actual.shape[2]
        assert_close(f"feature {i}", actual, expected)


@interpreted
@pytest.mark.parametrize("name", OPTIONS)
def test_golden_last_stage_in_triton(name):
    """From the recorded map of the third: an interpreter takes minutes for those before it, and for v0's gradients."""
    model, golden = mini(name)
    with use_backend("triton"), torch.set_grad_enabled(name == "s1"):
        x = model.stages[3](golden["features"][2].permute(0, 2, 3, 1))
        assert_close("feature 3", x.permute(0, 3, 1, 2), golden["features"][3])
        logits = model.forward_head(model.norm(x))
        assert_close("logits", logits, golden["logits"])
        if name == "s1":
            (logits * golden["grad_w"]).sum().backward()
            assert all(
                w.grad is not None for part in (model.stages[3], model.norm, model.head) for w in part.parameters()
            )
            check_gradients(model, golden)


def test_in_the_interpreter():
    run_in_interpreter(__file__, "-k", "in_triton")


def test_rows_and_columns_of_the_map_change_places_with_their_weights():
    """A transposed image gives transposed features where the weights of rows and columns are swapped."""
    torch.manual_seed(1)
    op, other = SS2D(8, 2), SS2D(8, 2)
    with torch.no_grad():
        for weight in op.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
        other.load_state_dict(op.state_dict())
        order = [1, 0, 3, 2]
        for key in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias"):
            getattr(other, key).copy_(getattr(op, key)[order])
        for key in ("A_logs", "Ds"):
            getattr(other, key).copy_(getattr(op, key).view(4, 16, -1)[order].reshape(getattr(op, key).shape))
        other.conv2d.weight.copy_(op.conv2d.weight.transpose(2, 3))
        x = torch.randn(2, 3, 5, 8)
        assert_close("map", other(x.transpose(1, 2)).transpose(1, 2), op(x))
        assert (op(x) - other(x)).abs().max() > 1e-2


def test_vanilla_features_of_odd_sizes_are_those_of_padded_maps():
    """A merging of 2 x 2 patches pads an odd side with zeros at its end."""
    model, _ = mini("v0")
    stage = model.stages[1]
    x = torch.randn(2, 5, 7, 16)
    padded = nn.functional.pad(x, (0, 0, 0, 1, 0, 1))
    with torch.no_grad():
        assert torch.equal(stage.downsample(x), stage.downsample(padded))
        assert stage.downsample(x).shape == (2, 3, 4, 32)
        with torch.no_grad():
            assert model(torch.randn(1, 3, 45, 71)).isfinite().all()


def test_the_norm_comes_before_the_pooling():
    model, golden = mini("s1")
    with torch.no_grad():
        features = model.forward_features(golden["x"])
        assert_close("logits", model.head.fc(features.mean((1, 2))), golden["logits"])
        pooled_first = model.head.fc(model.norm(model.stages(model.stem(golden["x"])).mean((1, 2))))
    assert (pooled_first - golden["logits"]).abs().max() > 0.1


def test_batch_size_does_not_change_the_result(backend):
    model, golden = mini("s1")
    with torch.no_grad():
        assert_close("logits", model(golden["x"])[1:], model(golden["x"][1:]))


def test_float64_runs_in_float64():
    model, golden = mini("s1")
    with torch.no_grad():
        logits = model.double()(golden["x"].double())
    assert logits.dtype == torch.float64
    assert_close("logits", logits, golden["logits"])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_close_and_scans_in_float32(name, dtype):
    seen = []
    model, golden = mini(name)
    for module in model.modules():
        if isinstance(module, SS2D):
            module.out_norm.register_forward_hook(lambda _, args, out: seen.extend((args[0].dtype, out.dtype)))
    with torch.no_grad(), torch.autocast("cpu", dtype):
        logits = model(golden["x"])
    assert logits.dtype == dtype and set(seen) == {torch.float32}
    assert_close("logits", logits.float(), golden["logits"], "bfloat16")
    with torch.no_grad():
        low = model.to(dtype)(golden["x"].to(dtype))
    assert low.dtype == dtype and set(seen) == {torch.float32}
    assert nn.functional.cosine_similarity(low.float().flatten(), golden["logits"].flatten(), 0) > 0.998


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 2, 3])
def test_narrow_maps_are_halved_as_they_are_in_float64(columns, dtype):
    """A bfloat16 convolution of torch reads beyond a map that is narrower than its kernel."""
    torch.manual_seed(3)
    layer, x = Downsample(8, 16, None, None), torch.randn(2, 64, columns, 8)
    seed, results = torch.randn(2, 32, (columns + 1) // 2, 16), []
    for kind in (torch.float64, dtype):
        inputs = x.to(kind).requires_grad_()
        y = layer.to(kind)(inputs)
        results.append([y, *torch.autograd.grad(y, [inputs, *layer.parameters()], seed.to(kind))])
    for expected, actual in zip(*results, strict=True):
        assert expected.shape == actual.shape
        assert nn.functional.cosine_similarity(actual.double().flatten(), expected.flatten(), 0) > 0.999


def test_initial_weights_are_vmambas():
    torch.manual_seed(1)
    model = VMamba(embed_dim=32, depths=(1, 1, 1, 1), vanilla=True, d_state=4, num_classes=100)
    op = model.stages[3].blocks[0].op
    assert torch.equal(op.A_logs, torch.arange(1, 5).float().log().expand(4 * 256, 4)) and op.Ds.eq(1).all()
    steps = nn.functional.softplus(op.dt_projs_bias)
    assert 0.9e-3 < steps.min() < 2e-3 and 0.05 < steps.max() < 0.101
    assert not torch.equal(op.dt_projs_bias[0], op.dt_projs_bias[1])
    for weight, bound in ((op.dt_projs_weight, 16**-0.5), (op.x_proj_weight, 256**-0.5)):
        assert 0.98 * bound < weight.abs().max() <= bound
    for linear in (op.in_proj, op.out_proj, model.head.fc, model.stages[3].downsample.reduction):
        assert 0.019 < linear.weight.std() < 0.021
    assert not model.head.fc.bias.any() and model.stem.conv1.bias.any()
    for kind in (model, VMamba(embed_dim=8, depths=(1, 1))):
        assert {module.eps for module in kind.modules() if isinstance(module, nn.LayerNorm)} == {1e-5}


def test_stochastic_depth_grows_linearly():
    model = VMamba(embed_dim=8, depths=(2, 1, 2, 1), drop_path_rate=0.2)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.04, 0.08, 0.12, 0.16, 0.2])


def test_checkpointing_changes_nothing():
    model = timm.create_model("test_vmamba")
    x = torch.randn(2, 3, 64, 64)
    plain = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    saved = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    for (name, _), a, b in zip(model.named_parameters(), saved, plain, strict=True):
        assert torch.equal(a, b), name


def train(model, loss_of, steps=3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    losses = []
    for _ in range(steps):
        torch.manual_seed(2)  # for dropout, and for the anchors that a detector samples
        loss = loss_of()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("kind", ["Unet", "FPN"])
def test_segmentation_models_trains_on_the_pyramid(kind):
    channels = {"decoder_channels": (16, 8, 8, 8)} if kind == "Unet" else {"decoder_pyramid_channels": 16}
    model = getattr(segmentation_models_pytorch, kind)(
        "tu-test_vmamba", encoder_weights=None, encoder_depth=4 if kind == "Unet" else 5, classes=2, **channels
    )
    x = torch.randn(2, 3, 64, 64)
    target = (x.mean(1) > 0).long()
    losses = train(model, lambda: nn.functional.cross_entropy(model(x), target))
    assert losses[2] < losses[0]
    assert all(p.grad is not None for p in model.encoder.model.parameters())


class Pyramid(nn.Module):
    """A backbone as torchvision's detectors take it."""

    out_channels = 16

    def __init__(self):
        super().__init__()
        self.body = timm.create_model("test_vmamba", features_only=True)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), self.out_channels)

    def forward(self, x):
        return self.fpn({str(i): y for i, y in enumerate(self.body(x))})


def test_torchvision_trains_a_detector_on_the_pyramid():
    sizes = tuple((size,) for size in (16, 32, 48, 64))
    anchors = AnchorGenerator(sizes, ((1.0,),) * 4)
    model = FasterRCNN(Pyramid(), 2, min_size=96, max_size=128, rpn_anchor_generator=anchors).train()
    images = [torch.rand(3, 90, 120), torch.rand(3, 96, 70)]
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 50.0, 60.0]]), "labels": torch.tensor([1])}] * 2
    losses = train(model, lambda: sum(model(images, targets).values()))
    assert losses[2] < losses[0]
    assert all(p.grad is not None for p in model.backbone.body.parameters())
    with torch.no_grad():
        assert {"boxes", "labels", "scores"} <= model.eval()(images)[0].keys()


@pytest.mark.parametrize("method", METHODS)
def test_train_ssl_trains_it_with_every_method(tmp_path, method):
    flags = ["--model", "test_vmamba", "--img-size", "32", "-b", "4", "-vb", "250", "--epochs", "1"]
    flags += ["--train-batches-per-epoch", "2", "--warmup-epochs", "0", "--ssl-method", method]
    flags += [] if method == "supervised" else ["--pseudo-mixup", "none", "--unlabeled-ratio", "1"]
    result = train_ssl.main([*flags, "--output", str(tmp_path), "--experiment", "run"])
    assert result["updates"] == 2 and 0 <= result["teacher"]["top1"] <= 100
    student, teacher = states(tmp_path / "run")
    key = "stages.1.blocks.0.op.x_proj_weight"
    assert student[key].isfinite().all() and not torch.equal(student[key], teacher[key])
