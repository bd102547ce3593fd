"""Whole models on a GPU against the CPU: same weights, same numbers, compiled and in half precision."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F

import semivim  # noqa: F401  registers the models
from tests.tolerance import assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture
def pair():
    torch.manual_seed(0)
    model = timm.create_model("vim_tiny_patch16_224", depth=4, num_classes=10).eval()
    return model, copy.deepcopy(model).cuda()


def gradients(model, x):
    out = model(x)
    return [out, *torch.autograd.grad(out.square().mean(), list(model.parameters()))]


def compare(model, actual, expected):
    for name, a, b in zip(("logits", *dict(model.named_parameters())), actual, expected, strict=True):
        assert_close(name, a.cpu(), b.cpu(), "float32_grad")


def test_logits_and_gradients_are_the_cpus(pair):
    cpu, gpu = pair
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    x = torch.randn(2, 3, 224, 224)
    compare(cpu, gradients(gpu, x.cuda()), gradients(cpu, x))


@pytest.mark.filterwarnings("ignore")  # Inductor's, about matrix products in float32
def test_compiled_in_one_graph(pair):
    _, gpu = pair
    x = torch.randn(2, 3, 224, 224, device="cuda")
    compare(gpu, gradients(torch.compile(gpu, fullgraph=True), x), gradients(gpu, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_close(pair, dtype):
    cpu, gpu = pair
    x = torch.randn(4, 3, 224, 224)
    with torch.no_grad(), torch.autocast("cuda", dtype):
        y = gpu(x.cuda()).float().cpu()
    with torch.no_grad():
        expected = cpu(x)
    assert_close("logits", y, expected, "bfloat16")
    assert F.cosine_similarity(y.flatten(), expected.flatten(), 0) > 0.999


def training_step(model, optimizer, x):
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_training_step_never_waits_for_the_device(pair):
    _, gpu = pair
    optimizer, x = torch.optim.AdamW(gpu.parameters()), torch.randn(2, 3, 224, 224, device="cuda")
    training_step(gpu, optimizer, x)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        training_step(gpu, optimizer, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_training_step_in_a_graph_is_the_eager_one(pair):
    _, gpu = pair
    twin, x = copy.deepcopy(gpu), torch.randn(2, 3, 224, 224, device="cuda")
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in (gpu, twin)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            training_step(gpu, optimizers[0], x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = training_step(gpu, optimizers[0], x)
    for _ in range(3):
        graph.replay()
    for _ in range(5):
        expected = training_step(twin, optimizers[1], x)
    assert_close("loss", loss, expected, "bfloat16")
    for (name, a), b in zip(gpu.named_parameters(), twin.parameters(), strict=True):
        assert_close(name, a, b, "bfloat16")


@pytest.mark.slow
def test_a_thousand_fp16_steps_stay_finite_and_learn():
    torch.manual_seed(0)
    model = timm.create_model("semivim_pico", num_classes=10).cuda()
    images, labels = torch.randn(200, 3, 32, 32, device="cuda"), torch.arange(200, device="cuda") % 10
    optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.amp.GradScaler("cuda")
    losses = []
    for step in range(1000):
        rows = torch.randint(200, (16,), generator=torch.Generator().manual_seed(step)).cuda()
        with torch.autocast("cuda", torch.float16):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert torch.tensor(losses).isfinite().all()
    assert scaler.get_scale() >= 1, "every step overflowed"
    assert sum(losses[-100:]) < 0.5 * sum(losses[:100])
