import pytest
import torch
import torch.nn.functional as F

import semivim
from semivim.ops import norm_numba
from semivim.ops.rms_norm import rms_norm
from tests.tolerance import assert_close

EPS = 1e-5


def operands(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype).requires_grad_(), torch.randn(shape[-1], dtype=dtype).requires_grad_()


def torchs(x, weight):
    return F.rms_norm(x, weight.shape, weight, EPS)


@pytest.fixture
def launched(monkeypatch):
    """Names of the passes of the kernels that ran."""
    passes = []
    for name in ("forward", "backward"):
        run = getattr(norm_numba, name)
        monkeypatch.setattr(norm_numba, name, lambda *args, _run=run, _name=name: passes.append(_name) or _run(*args))
    return passes


def test_float32_on_a_cpu_runs_in_the_kernels(launched):
    x, weight = operands(2, 9, 40)
    y, expected = rms_norm(x, weight, EPS), torchs(x, weight)
    assert_close("y", y, expected)
    grad = torch.randn_like(y)
    gradients, of_torch = (torch.autograd.grad(z, (x, weight), grad) for z in (y, expected))
    assert_close("dx", gradients[0], of_torch[0], "float32_grad")
    assert_close("dweight", gradients[1], of_torch[1], "float32_grad")
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, EPS), y)
    assert launched == ["forward", "backward", "forward"]


def test_a_named_backend_is_taken(launched):
    x, weight = operands(3, 20)
    with semivim.use_backend("reference"):
        y = rms_norm(x, weight, EPS)
    torch.autograd.grad(y.sum(), (x, weight))
    assert_close("y", y, torchs(x, weight))
    assert not launched


def test_a_backend_that_has_no_norm_leaves_the_choice(launched):
    with semivim.use_backend("triton"):
        rms_norm(*operands(3, 20), EPS)
    assert launched == ["forward"]


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16))
def test_other_dtypes_are_torchs_to_the_bit(launched, dtype):
    x, weight = operands(3, 20, dtype=dtype)
    assert torch.equal(rms_norm(x, weight, EPS), torchs(x, weight))
    assert not launched


def test_compiled_programs_are_torchs(launched):
    x, weight = operands(3, 20)
    compiled = torch.compile(rms_norm, backend="aot_eager", fullgraph=True)
    y = compiled(x, weight, EPS)
    assert_close("y", y, torchs(x, weight))
    torch.autograd.grad(y.sum(), (x, weight))
    assert not launched


@pytest.mark.parametrize("shape", ((20,), (3, 20), (2, 3, 20)))
@pytest.mark.parametrize("backend", ("numba", "reference"))
def test_any_number_of_dimensions(shape, backend):
    x, weight = operands(*shape)
    grad = torch.randn(shape)
    with semivim.use_backend(backend):
        gradients = torch.autograd.grad(rms_norm(x, weight, EPS), (x, weight), grad)
    for name, ours, theirs in zip(
        ("dx", "dweight"), gradients, torch.autograd.grad(torchs(x, weight), (x, weight), grad), strict=True
    ):
        assert_close(name, ours, theirs, "float32_grad")


def test_saved_tensors_may_come_back_in_another_dtype():
    x, weight = operands(300, 20)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.double(), lambda t: t):
        y = rms_norm(x, weight, EPS)
    for name, ours, theirs in zip(
        ("dx", "dweight"),
        torch.autograd.grad(y.sum(), (x, weight)),
        torch.autograd.grad(torchs(x, weight).sum(), (x, weight)),
        strict=True,
    ):
        assert_close(name, ours, theirs, "float32_grad")


def test_exported_and_transformed_programs_are_torchs(launched):
    x, weight = operands(3, 20)
    program = torch.export.export(torch.nn.RMSNorm(20, eps=EPS), (x,)).graph_module.code

    class Ours(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(20))

        def forward(self, x):
            return rms_norm(x, self.weight, EPS)

    assert torch.export.export(Ours(), (x,)).graph_module.code == program
    gradients = torch.func.vmap(torch.func.grad(lambda x: rms_norm(x, weight, EPS).sum()))(x.detach())
    assert_close("dx", gradients, torch.autograd.grad(torchs(x, weight).sum(), x)[0], "float32_grad")
    assert not launched


def test_second_derivative():
    x, weight = operands(3, 20)
    results = []
    for norm in (lambda: rms_norm(x, weight, EPS), lambda: torchs(x, weight)):
        first = torch.autograd.grad(norm().square().sum(), (x, weight), create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight)))
    for name, ours, theirs in zip(("x", "weight"), *results, strict=True):
        assert_close(name, ours, theirs, "float32_grad")


def test_frozen_weights_and_inputs_get_no_gradient():
    x, weight = operands(3, 20)
    (dx,) = torch.autograd.grad(rms_norm(x, weight.detach(), EPS).sum(), x)
    (dweight,) = torch.autograd.grad(rms_norm(x.detach(), weight, EPS).sum(), weight)
    both = torch.autograd.grad(torchs(x, weight).sum(), (x, weight))
    assert_close("dx", dx, both[0], "float32_grad")
    assert_close("dweight", dweight, both[1], "float32_grad")
    assert not rms_norm(x.detach(), weight.detach(), EPS).requires_grad


def test_no_rows_and_a_wrong_width():
    x, weight = operands(0, 20)
    rms_norm(x, weight, EPS).sum().backward()
    assert x.grad.shape == (0, 20)
    with pytest.raises(RuntimeError, match="20"):
        rms_norm(torch.randn(3, 10), weight, EPS)
