"""Precision of whole models on a CPU: half precision, one thread or two, a thousand steps of bfloat16 training."""

import pytest
import timm
import torch
import torch.nn.functional as F

import semivim  # noqa: F401  registers the models
from semivim.data import open_source
from tests.tolerance import assert_close


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = timm.create_model("vim_tiny_patch16_224", depth=3, num_classes=10)
    torch.nn.init.trunc_normal_(model.head.weight, std=0.02)
    return model


def logits_and_gradients(model, x):
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), list(model.parameters()))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_close_to_float32(model, dtype):
    x = torch.randn(2, 3, 224, 224)
    expected = logits_and_gradients(model, x)
    with torch.autocast("cpu", dtype):
        actual = logits_and_gradients(model, x)
    assert actual[0].dtype == dtype
    assert_close("logits", actual[0], expected[0], str(dtype).removeprefix("torch."))
    for a, b in zip(actual, expected, strict=True):
        assert F.cosine_similarity(a.float().flatten(), b.flatten(), 0) > 0.999


def test_same_bits_twice_and_threads_change_no_more_than_1e_6(model):
    x = torch.randn(2, 3, 224, 224)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 2):
            torch.set_num_threads(threads)
            results.append(logits_and_gradients(model, x))
    finally:
        torch.set_num_threads(before)
    for one, again, two, two_again in zip(*results, strict=True):
        assert torch.equal(one, again) and torch.equal(two, two_again)
        assert (one - two).abs().max() <= 1e-6 * one.abs().max()


@pytest.mark.slow
def test_a_thousand_bf16_steps_stay_finite_and_learn():
    source = open_source("embedded/digits")
    pixels = torch.stack(
        [torch.frombuffer(bytearray(source.image(i).tobytes()), dtype=torch.uint8) for i in range(200)]
    )
    images = pixels.view(-1, 1, 32, 32).float() / 127.5 - 1
    labels = torch.from_numpy(source.labels[:200])
    model = timm.create_model("semivim_pico", in_chans=1, num_classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(1000):
        rows = torch.randint(len(images), (4,), generator=torch.Generator().manual_seed(step))
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        gradients = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        assert loss.isfinite(), f"loss at step {step}"
        assert gradients.isfinite(), f"gradient at step {step}"
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-100:]) < 0.5 * sum(losses[:100])
