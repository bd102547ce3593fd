"""Compiling and exporting a whole model: same numbers, any batch size."""

import io
import shutil
from functools import partial

import onnxruntime
import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch.export import Dim
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import semivim  # noqa: F401  registers the models
from tests.tolerance import assert_close


@pytest.fixture
def model():
    return timm.create_model("test_vim", depth=1, num_classes=10).eval()


def image(batch):
    return torch.randn(batch, 3, 32, 32)


def check_compiled(model, backend):
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x, psi, nu = image(2), torch.rand(2), torch.rand(2)
    for mix in ((), (psi, nu)):
        assert_close("logits", compiled(x, *mix), model(x, *mix))
    weights = list(model.parameters())
    wanted = torch.autograd.grad(model(x, psi, nu).square().sum(), weights)
    actual = torch.autograd.grad(compiled(x, psi, nu).square().sum(), weights)
    for (name, _), a, b in zip(model.named_parameters(), actual, wanted, strict=True):
        assert_close(name, a, b, "float32_grad")


def test_compile_traces_one_graph_forward_and_backward(model):
    check_compiled(model, "aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch's Inductor needs a C++ compiler on a CPU")
def test_compile_with_inductor(model):
    check_compiled(model, "inductor")


def test_export_keeps_our_ops_and_the_batch_free(model):
    with torch.no_grad():
        program = torch.export.export(model, (image(2),), dynamic_shapes=({0: Dim("batch")},))
        ours = [node for node in program.graph.nodes if str(node.target).startswith("semivim.")]
        assert len(ours) == 2 * len(model.blocks)
        x = image(5)
        assert_close("logits", program.module()(x), model(x))


def test_onnx_runs_in_onnxruntime_with_one_scan_node_a_block(model, tmp_path):
    program = torch.onnx.export(model, (image(2),), dynamo=True, dynamic_shapes=({0: Dim("batch")},), verbose=False)
    nodes = [node.op_type for node in program.model.graph]
    assert nodes.count("Scan") == len(model.blocks)
    assert {node.domain for node in program.model.graph} == {""}
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    x = image(5)
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert_close("logits", torch.from_numpy(logits), model(x))


def loss_of(model, parameters, x):
    return torch.func.functional_call(model, parameters, (x[None],)).square().sum()


def test_gradients_of_each_image_by_torch_func(model):
    parameters, x = dict(model.named_parameters()), image(3)
    each = torch.func.vmap(torch.func.grad(partial(loss_of, model)), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        expected = torch.autograd.grad(model(x[i : i + 1]).square().sum(), list(parameters.values()))
        for (name, gradient), b in zip(each.items(), expected, strict=True):
            assert_close(name, gradient[i], b, "float32_grad")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_forward_mode_differentiation(model):
    model, x = model.double(), image(2).double()
    direction = torch.randn_like(x)
    _, slope = torch.func.jvp(model, (x,), (direction,))
    with torch.no_grad():
        expected = (model(x + 1e-6 * direction) - model(x - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-7)


def test_symbolic_tracing_and_torchvisions_feature_extraction(model):
    x = image(2)
    assert_close("logits", torch.fx.symbolic_trace(model)(x), model(x))
    nodes, _ = get_graph_node_names(model)
    assert "blocks.0.add" in nodes
    features = create_feature_extractor(model, ["blocks.0.add"])(x)["blocks.0.add"]
    assert_close("features", model.norm(features), model.forward_features(x))


@pytest.mark.filterwarnings("ignore:Using backward")
def test_an_optimizer_of_second_order_steps(model):
    optimizer = create_optimizer_v2(model, opt="adahessian")
    before = model.blocks[0].mixer.A_log.detach().clone()
    model(image(2)).square().sum().backward(create_graph=True)
    optimizer.step()
    optimizer.zero_grad()
    assert not torch.equal(model.blocks[0].mixer.A_log, before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit", "ignore:.*legacy")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_the_legacy_onnx_exporter_is_refused_in_one_line(model):
    with pytest.raises(ValueError, match=r"^the legacy ONNX exporter .* dynamo=True"):
        torch.onnx.export(model, (image(2),), io.BytesIO(), dynamo=False)
