"""A small model, its training step and the comparisons that the LyapEMA tests share."""

import copy
import math

import torch
from torch import nn

from semivim.utils.lyap_ema import LyapEmaV3
from semivim.utils.lyapunov import LyapStats

PROJECTING = ("default", "paper_stable")


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A model with float buffers, an integer buffer and a frozen parameter."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.GELU(), nn.Linear(24, 5)).to(dtype)
    model[3].bias.requires_grad_(False)
    return model


def make_optimizer(model: nn.Module, lr: float = 1e-2, name: str = "adamw") -> torch.optim.Optimizer:
    params = [p for p in model.parameters() if p.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(params, lr=lr, momentum=0.9)
    return torch.optim.AdamW(params, lr=lr)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 12, generator=generator)
    loss = (model(x) - x[:, :5].sin()).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def trained(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach() for p in model.parameters() if p.requires_grad]


def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return math.sqrt(sum((x.double() - y.double()).square().sum().item() for x, y in zip(a, b, strict=True)))


def teacher_of(ema: LyapEmaV3, student: nn.Module) -> list[torch.Tensor]:
    pairs = zip(ema.module.parameters(), student.parameters(), strict=True)
    return [t.detach() for t, s in pairs if s.requires_grad]


def copies(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x.clone() for x in tensors]


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(module.state_dict())


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def spiked_run(ema: LyapEmaV3, model: nn.Module, steps: range, lr: float = 1e-2) -> list[LyapStats]:
    """A run whose learning rate is 30 times too high for ten steps, so that the guard has work."""
    optimizer = make_optimizer(model, lr)
    stats = []
    for step in steps:
        optimizer.param_groups[0]["lr"] = lr * (30 if 20 <= step < 30 else 1)
        train_step(model, optimizer, step)
        stats.append(ema.update(model, step))
    return stats
