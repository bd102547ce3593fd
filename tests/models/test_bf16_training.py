"""A thousand steps in bfloat16 autocast on a CPU: the scan, its parameters and the residual never leave float32."""

import pytest
import timm
import torch
import torch.nn.functional as F

import semivim  # noqa: F401  registers the models
from semivim.data import open_source


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
