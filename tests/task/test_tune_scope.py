import pytest
import timm
import torch

import semivim  # noqa: F401  registers the models
from semivim.task.tune_scope import TUNE_SCOPES, limit_training
from semivim.utils.user_error import UserError


def trained(name, scope):
    model = timm.create_model(name, num_classes=3)
    limit_training(model, scope)
    return {n for n, p in model.named_parameters() if p.requires_grad}, {n for n, _ in model.named_parameters()}


def test_scopes_of_a_vim():
    everything, names = trained("test_vim", "all")
    assert everything == names
    assert trained("test_vim", "head")[0] == {"head.weight", "head.bias"}
    scans, _ = trained("test_vim", "ssm")
    mixer = {n.removeprefix("blocks.0.mixer.") for n in scans if n.startswith("blocks.0.")}
    directions = [("A_log", "D", "x_proj", "dt_proj"), ("A_b_log", "D_b", "x_proj_b", "dt_proj_b")]
    assert {n.split(".")[0] for n in mixer} == {name for direction in directions for name in direction}
    assert {n for n in scans if not n.startswith("blocks")} == {"cls_token", "head.weight", "head.bias"}


def test_frozen_parameters_get_no_gradient_and_trained_ones_do():
    model = timm.create_model("test_vim", num_classes=3)
    limit_training(model, "ssm")
    model(torch.randn(1, 3, 32, 32)).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_other_models_have_a_head_and_no_scan(name):
    head, _ = trained(name, "head")
    assert len(head) == 2
    with pytest.raises(UserError, match="--tune-scope ssm trains scans, and .* has none: name all or head"):
        trained(name, "ssm")
    assert TUNE_SCOPES == ("all", "ssm", "head")
