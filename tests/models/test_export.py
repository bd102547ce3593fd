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

# A model of each family, and how many of our ops and of ONNX's Scan nodes it has.
FAMILIES = {
    "test_vim": ({"depth": 1}, 2, 1),  # a convolution and a scan of both directions
    "test_vmamba": ({"depths": (1, 1)}, 4, 4),  # two blocks that scan rows and columns
}


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return timm.create_model(name, num_classes=10, **FAMILIES[name][0]).eval()


def image(batch):
    return torch.randn(batch, 3, 32, 32)


def check_compiled(model, backend):
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = image(2)
    for mix in [(), (torch.rand(2), torch.rand(2))] if getattr(model, "mixes", False) else [()]:
        assert_close("logits", compiled(x, *mix), model(x, *mix))
    weights = list(model.parameters())
    wanted = torch.autograd.grad(model(x, *mix).square().sum(), weights)
    actual = torch.autograd.grad(compiled(x, *mix).square().sum(), weights)
    for (name, _), a, b in zip(model.named_parameters(), actual, wanted, strict=True):
        assert_close(name, a, b, "float32_grad")


def test_compile_traces_one_graph_forward_and_backward(model):
    check_compiled(model, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_vim"])  # of a pyramid it compiles for minutes
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch's Inductor needs a C++ compiler on a CPU")
def test_compile_with_inductor(model):
    check_compiled(model, "inductor")


def test_export_keeps_our_ops_and_the_batch_free(name, model):
    with torch.no_grad():
        program = torch.export.export(model, (image(2),), dynamic_shapes=({0: Dim("batch")},))
        ours = [node for node in program.graph.nodes if str(node.target).startswith("semivim.")]
        assert len(ours) == FAMILIES[name][1]
        x = image(5)
        assert_close("logits", program.module()(x), model(x))


def test_onnx_runs_in_onnxruntime_with_a_scan_node_for_each_scan(name, model, tmp_path):
    program = torch.onnx.export(model, (image(2),), dynamo=True, dynamic_shapes=({0: Dim("batch")},), verbose=False)
    nodes = [node.op_type for node in program.model.graph]
    assert nodes.count("Scan") == FAMILIES[name][2]
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


def test_symbolic_tracing_and_torchvisions_feature_extraction(name, model):
    x = image(2)
    assert_close("logits", torch.fx.symbolic_trace(model)(x), model(x))
    nodes, _ = get_graph_node_names(model)
    last = {"test_vim": "blocks.0.add", "test_vmamba": "stages.1.blocks.0.add_1"}[name]
    assert last in nodes
    features = create_feature_extractor(model, [last])(x)[last]
    assert_close("features", model.norm(features), model.forward_features(x))


@pytest.mark.filterwarnings("ignore:Using backward")
def test_an_optimizer_of_second_order_steps(model):
    optimizer = create_optimizer_v2(model, opt="adahessian")
    rates = next(p for key, p in model.named_parameters() if key.endswith(("A_log", "A_logs")))
    before = rates.detach().clone()
    model(image(2)).square().sum().backward(create_graph=True)
    optimizer.step()
    optimizer.zero_grad()
    assert not torch.equal(rates, before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit", "ignore:.*legacy")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_the_legacy_onnx_exporter_is_refused_in_one_line(model):
    with pytest.raises(ValueError, match=r"^the legacy ONNX exporter .* dynamo=True"):
        torch.onnx.export(model, (image(2),), io.BytesIO(), dynamo=False)
