"""A prior removed from a trained head: what the exported files then compute, and when it is refused."""

import json
from contextlib import nullcontext

import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import semivim  # noqa: F401  registers the models
from semivim.runs.checkpoint import save_model
from semivim.task.posthoc import (
    debiased_copies,
    mean_prediction,
    read_adjustment,
    refuse_second_removal,
    shift_head,
    start_adjusted,
)
from semivim.utils.user_error import UserError

PRIOR = torch.tensor([0.7, 0.2, 0.1])


def make(name="test_vim", **options):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **options)


def images(seed=0, rows=3):
    torch.manual_seed(seed)
    return [torch.randn(rows, 3, 32, 32), torch.randn(1, 3, 32, 32)]


def copies(model, by, tau=1.0):
    return debiased_copies({"student": model, "teacher": model}, by, tau, PRIOR, images, nullcontext)


def test_mean_prediction_weighs_images_alike_in_eval_mode_and_without_gradient():
    model = make("test_vim", drop_rate=0.9).train()
    mean = mean_prediction(model, images(), nullcontext)
    assert not model.training
    assert not mean.requires_grad
    torch.testing.assert_close(mean, model(torch.cat(images())).softmax(-1).mean(0).detach())
    assert mean.sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", ["test_vim", "test_vit", "test_resnet"])
@pytest.mark.parametrize("by", ["labeled", "unlabeled"])
def test_copies_give_the_logits_less_the_prior_and_the_models_stay(name, by):
    options = {"img_size": 32} if name == "test_vit" else {}
    model = make(name, **options).eval()
    x = images(seed=1)[0]
    before = model(x).detach()
    made = copies(model, by, tau=0.5)
    assert list(made) == ["student_debiased", "teacher_debiased"]
    prior = PRIOR if by == "labeled" else mean_prediction(model, images(), nullcontext)
    for copy in made.values():
        torch.testing.assert_close(copy(x), before - 0.5 * prior.log(), rtol=1e-6, atol=1e-6)
    assert torch.equal(model(x), before)


def test_none_copies_nothing():
    assert copies(make(), "none") == {}


@pytest.mark.filterwarnings("ignore")
def test_saved_and_onnx_models_carry_the_adjustment(tmp_path):
    model = make(depth=1).eval()
    adjusted = copies(model, "labeled")["teacher_debiased"]
    x = images(seed=1)[0]
    wanted = (model(x) - PRIOR.log()).detach()
    save_model(adjusted, tmp_path, ["a", "b", "c"])
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(loaded(x), wanted, rtol=1e-6, atol=1e-6)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["logit_adjustment"] == {"by": "labeled", "tau": 1.0}
    assert config["label_names"] == ["a", "b", "c"]
    torch.onnx.export(adjusted, (x,), str(tmp_path / "model.onnx"), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    (given,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(given), wanted, rtol=1e-4, atol=1e-4)


def test_second_adjustment_after_training_is_refused_and_a_plain_model_is_not_marked(tmp_path):
    checkpoint = str(tmp_path / "model.safetensors")
    save_model(copies(make(), "labeled")["teacher_debiased"], tmp_path)
    with pytest.raises(
        UserError, match=r"--posthoc-debias unlabeled: .* lost a prior after training already \(labeled\)"
    ):
        refuse_second_removal(checkpoint, "unlabeled")
    refuse_second_removal(checkpoint, "none")
    refuse_second_removal("", "labeled")
    save_model(make(), tmp_path)
    refuse_second_removal(checkpoint, "labeled")
    assert "logit_adjustment" not in json.loads((tmp_path / "config.json").read_text())
    assert read_adjustment(tmp_path / "model.safetensors") is None


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "Expecting value"),
        ("[]", "wanted a mapping, got list"),
        ('{"logit_adjustment": "x"}', "logit_adjustment is 'x', wanted a mapping"),
    ],
)
def test_a_damaged_config_beside_a_checkpoint_is_named(text, cause, tmp_path):
    checkpoint = tmp_path / "model.safetensors"
    save_model(make(), tmp_path)
    (tmp_path / "config.json").write_text(text)
    said = rf"^--initial-checkpoint \S+safetensors: config\.json: {cause}"
    with pytest.raises(UserError, match=said):
        refuse_second_removal(str(checkpoint), "labeled")
    with pytest.raises(UserError, match=said):
        start_adjusted(make(), str(checkpoint), PRIOR, 0.5)


def test_adjusted_training_starts_from_a_plain_head_once(tmp_path):
    plain, source = make().eval(), make().eval()
    x = images(seed=1)[0]
    save_model(source, tmp_path)
    start_adjusted(plain, str(tmp_path / "model.safetensors"), PRIOR, 0.5)
    torch.testing.assert_close(plain(x), source(x) - 0.5 * PRIOR.log())
    # what is saved of that run is known to be adjusted, and is not adjusted again
    save_model(plain, tmp_path)
    again = timm.create_model("test_vim", num_classes=3, checkpoint_path=str(tmp_path / "model.safetensors")).eval()
    start_adjusted(again, str(tmp_path / "model.safetensors"), PRIOR, 0.5)
    torch.testing.assert_close(again(x), plain(x))
    # a loss that is adjusted already, and a prior removed after training on top
    assert copies(again, "labeled")["teacher_debiased"].logit_adjustment == {
        "by": "labeled",
        "tau": 1.0,
        "loss_tau": 0.5,
    }


@pytest.mark.parametrize("checkpoint", ["", "backbone.safetensors", "backbone.pth"])
def test_new_head_has_no_prior_to_remove(checkpoint, tmp_path):
    weights = {name: value for name, value in make().state_dict().items() if not name.startswith("head.")}
    save_file(weights, tmp_path / "backbone.safetensors")
    torch.save({"state_dict": weights}, tmp_path / "backbone.pth")
    path = str(tmp_path / checkpoint) if checkpoint else ""
    model = timm.create_model("test_vim", num_classes=3, checkpoint_path=path).eval()
    before = model.head.bias.detach().clone()
    start_adjusted(model, path, PRIOR, 1.0)
    assert torch.equal(model.head.bias, before)
    assert model.logit_adjustment == {"by": "loss", "tau": 1.0}


@pytest.mark.parametrize("head", [nn.Identity(), nn.Linear(32, 3, bias=False)])
def test_head_without_a_bias_is_refused(head):
    model = make()
    model.head = head
    with pytest.raises(UserError, match=r"bias of a linear head \(nn\.Linear\), got (Identity|Linear without a bias)$"):
        shift_head(model, PRIOR, 1.0)
