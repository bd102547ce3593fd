"""The oneDNN product against `torch.nn.functional.linear`, in value, gradients and where it must step aside."""

import math
import platform
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from semivim.ops import linear as module
from semivim.ops.linear import add_product, least_work, linear, vendor
from tests.tolerance import assert_close

SHAPES = [((8, 197, 192), 768), ((1, 700, 384), 44), ((3, 1, 12), 80), ((5, 7), 3), ((1, 1), 1), ((2, 3, 4, 70), 65)]
on_x86 = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="torch takes oneDNN elsewhere"
)


@pytest.fixture(autouse=True)
def every_size_by_onednn(monkeypatch):
    monkeypatch.setattr(module, "_LEAST_WORK", 1)


def operands(shape, out, dtype=torch.float32):
    generator = torch.Generator().manual_seed(out)
    x = torch.randn(shape, generator=generator).to(dtype)
    weight = torch.randn(out, shape[-1], generator=generator).to(dtype)
    return x.requires_grad_(), weight.requires_grad_()


def kernels(call):
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    return {event.key for event in profiler.key_averages()}


@pytest.mark.parametrize(("shape", "out"), SHAPES)
def test_product_and_gradients_are_those_of_torch(shape, out):
    x, weight = operands(shape, out)
    y, expected = linear(x, weight), F.linear(x, weight)
    assert y.is_contiguous()
    assert_close("y", y, expected)
    grad = torch.randn_like(y)
    for name, ours, theirs in zip(
        ("dx", "dweight"),
        torch.autograd.grad(y, (x, weight), grad),
        torch.autograd.grad(expected, (x, weight), grad),
        strict=True,
    ):
        assert_close(name, ours, theirs)


def test_strided_operands_and_gradient():
    x, weight = operands((4, 50, 140), 96)
    rows, matrix = x[:, ::2, ::2], weight[:, :70]
    y, expected = linear(rows, matrix), F.linear(rows, matrix)
    assert_close("y", y, expected)
    grad = torch.randn(96, 25, 4).permute(2, 1, 0)
    ours, theirs = (torch.autograd.grad(out, (x, weight), grad) for out in (y, expected))
    assert_close("dx", ours[0], theirs[0])
    assert_close("dweight", ours[1], theirs[1])


def test_only_the_wanted_gradient_is_computed():
    x, weight = operands((4, 50, 70), 96)
    assert_close("dx", torch.autograd.grad(linear(x, weight.detach()).sum(), x)[0], weight.sum(0).expand_as(x))
    expected = x.detach().sum((0, 1)).expand_as(weight)
    assert_close("dweight", torch.autograd.grad(linear(x.detach(), weight).sum(), weight)[0], expected, "float32_grad")


def test_second_derivative():
    x, weight = operands((4, 30, 70), 66)

    def second(product):
        dx = torch.autograd.grad(product(x, weight).pow(3).sum(), x, create_graph=True)[0]
        return torch.autograd.grad(dx.square().sum(), weight)[0]

    assert_close("second", second(linear), second(F.linear), "float32_grad")


@on_x86
def test_one_image_on_one_thread_runs_in_onednn_both_ways():
    x, weight = operands((1, 197, 192), 768)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ran = kernels(lambda: linear(x, weight).sum().backward())
    finally:
        torch.set_num_threads(threads)
    assert "aten::mkldnn_convolution" in ran
    assert not {"aten::mm", "aten::addmm", "aten::convolution_backward"} & ran


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_torchs_product_to_the_bit(dtype):
    x, weight = operands((3, 9, 64), 80, dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_autocast_holds():
    x, weight = operands((3, 9, 64), 80)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, weight)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, F.linear(x.bfloat16(), weight.bfloat16()))


def test_no_rows():
    x, weight = operands((0, 5, 64), 80)
    y = linear(x, weight)
    assert y.shape == (0, 5, 80)
    y.sum().backward()
    assert not weight.grad.any()


def test_a_subclassed_weight_brings_its_own_product():
    class Doubling(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is F.linear:
                return 2 * F.linear(args[0], args[1].as_subclass(torch.Tensor))
            return super().__torch_function__(function, types, args, kwargs)

    x, weight = operands((3, 64), 80)
    assert_close("y", linear(x, weight.detach().as_subclass(Doubling)), 2 * F.linear(x, weight))


def test_compiled_in_one_graph():
    x, weight = operands((2, 30, 64), 80)

    def gradients(product):
        return torch.autograd.grad(product(x, weight).square().sum(), (x, weight))

    ours, theirs = gradients(torch.compile(linear, fullgraph=True, backend="aot_eager")), gradients(F.linear)
    assert_close("dx", ours[0], theirs[0])
    assert_close("dweight", ours[1], theirs[1])


def test_exported_programs_hold_a_plain_linear():
    class Layer(torch.nn.Module):
        def forward(self, x, weight):
            return linear(x, weight)

    program = torch.export.export(Layer(), operands((2, 30, 64), 80))
    assert [str(node.target) for node in program.graph.nodes if node.op == "call_function"] == ["aten.linear.default"]


def test_a_wrong_width_is_torchs_error():
    x, weight = operands((3, 9, 64), 80)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x, weight[:, :60])


def test_maps_over_a_batch():
    x, weight = operands((3, 9, 64), 80)
    assert_close("y", torch.func.vmap(linear, in_dims=(0, None))(x, weight), F.linear(x, weight))


@on_x86
def test_smaller_products_are_torchs_to_the_bit(monkeypatch):
    x, weight = operands((3, 9, 64), 80)
    monkeypatch.setattr(module, "_LEAST_WORK", 3 * 9 * 64 * 80)
    assert "aten::conv2d" in kernels(lambda: linear(x, weight))
    monkeypatch.setattr(module, "_LEAST_WORK", 3 * 9 * 64 * 80 + 1)
    assert "aten::conv2d" not in kernels(lambda: linear(x, weight))
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_only_measured_processors_take_onednn(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for name, instructions, finite in (
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        ("", "DEFAULT", False),
    ):
        monkeypatch.setattr(module, "vendor", lambda name=name: name)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda value=instructions: value)
        assert (least_work() < math.inf) == finite, (name, instructions)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(module, "vendor", lambda: "AuthenticAMD")
    assert least_work() == math.inf


@pytest.mark.parametrize("name", ("AuthenticAMD", "GenuineIntel", ""))
def test_vendor(monkeypatch, name):
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"processor\t: 0\nvendor_id\t: {name}\ncpu family\t: 25\n")
    assert vendor() == name
    monkeypatch.setattr(Path, "exists", lambda _: False)
    monkeypatch.setattr(platform, "processor", lambda: f"Family 25 Model 33 Stepping 2, {name}")
    assert vendor() == name


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))  # of the product; the total is float32
@pytest.mark.parametrize("least_work", (1, math.inf), ids=("onednn", "torch"))
def test_a_product_is_added_to_a_total_in_place(monkeypatch, dtype, least_work):
    monkeypatch.setattr(module, "_LEAST_WORK", least_work)
    x, weight, total = torch.randn(50, 24).to(dtype), torch.randn(24, 70).to(dtype), torch.randn(50, 70)
    expected, by_linear = total + (x @ weight), []
    monkeypatch.setattr(module, "linear", lambda *args: by_linear.append(args) or linear(*args))
    added = add_product(total, x, weight)
    assert len(by_linear) == (dtype != torch.float32 or least_work == 1)
    assert added.data_ptr() == total.data_ptr()
    assert_close("total", added, expected)
