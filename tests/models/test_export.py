"""Compiling and exporting a whole model: same numbers, any batch size."""

import shutil

import onnxruntime
import pytest
import timm
import torch
from torch.export import Dim

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
