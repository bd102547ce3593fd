"""Compiling and exporting a DyVM: gates become masks, and any batch size gives the numbers of the plain program."""

from functools import partial

import onnxruntime
import pytest
import torch
from torch.export import Dim

from tests.dyvm_models import lively
from tests.tolerance import assert_close


@pytest.fixture
def model():
    return lively(num_classes=10, depth=3, pruning_loc=(1, 2))


def image(batch):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))


def check_compiled(model, backend):
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = image(5)
    with torch.no_grad():
        wanted = model(x, return_decisions=True)
        assert not wanted.gates.all() and wanted.gates.any()
        for name, a, b in zip(wanted._fields, compiled(x, return_decisions=True), wanted, strict=True):
            assert_close(name, a, b)


def test_compile_traces_one_graph(model):
    check_compiled(model, "aot_eager")


def test_a_compiled_training_step_gives_every_parameter_a_gradient(model):
    model.train()
    routed = torch.compile(model, fullgraph=True, backend="aot_eager")(image(4), return_decisions=True)
    sum(value.square().mean() for value in routed).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.any(), name


def test_export_keeps_our_ops_and_the_batch_free(model):
    with torch.no_grad():
        program = torch.export.export(model, (image(2),), dynamic_shapes=({0: Dim("batch")},))
        ours = [node for node in program.graph.nodes if str(node.target).startswith("semivim.")]
        assert len(ours) == 2 * len(model.blocks)
        assert_close("logits", program.module()(image(5)), model(image(5)))


def test_onnx_runs_in_onnxruntime(model, tmp_path):
    program = torch.onnx.export(model, (image(2),), dynamo=True, dynamic_shapes=({0: Dim("batch")},), verbose=False)
    assert {node.domain for node in program.model.graph} == {""}
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: image(5).numpy()})
    with torch.no_grad():
        assert_close("logits", torch.from_numpy(logits), model(image(5)))


def loss_of(model, parameters, x):
    return torch.func.functional_call(model, parameters, (x[None],)).square().sum()


def test_gradients_of_each_image_by_torch_func(model):
    parameters, x = dict(model.named_parameters()), image(3)
    each = torch.func.vmap(torch.func.grad(partial(loss_of, model)), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        loss = model(x[i : i + 1]).square().sum()
        expected = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for (name, gradient), b in zip(each.items(), expected, strict=True):
            assert_close(name, gradient[i], torch.zeros_like(gradient[i]) if b is None else b, "float32_grad")
