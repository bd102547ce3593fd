"""Small DyVMs: the recorded one, with what the release computed and the noise it drew, and one that chooses freely."""

from pathlib import Path

import timm
import torch
from torch import nn

from semivim.layers import dynamic_mamba, token_router
from semivim.models import DyVM
from semivim.models.vim_weights import checkpoint_filter_fn

GOLDEN = Path(__file__).parent / "golden"
MINI = {"img_size": 112, "embed_dim": 32, "depth": 8, "num_classes": 10, "pruning_loc": (2, 4, 6)}


def load_golden():
    return torch.load(GOLDEN / "dyvm_mini.pt", weights_only=True)


def build_mini(golden, **kwargs):
    model = DyVM(**MINI | kwargs).eval()
    model.load_state_dict(checkpoint_filter_fn(golden["state_dict"], model))
    return model


def replay_noise(golden, monkeypatch):
    """Let gates and routers draw the noise that the release drew."""
    noise = golden["train"]["noise"]
    drawn = []
    for i, pair in enumerate(noise["block"]):
        if i in MINI["pruning_loc"]:
            drawn.append(noise["token"][MINI["pruning_loc"].index(i)])
        drawn += [each.squeeze(1) for each in pair]
    drawn = iter(drawn)
    for module in (token_router, dynamic_mamba):
        monkeypatch.setattr(module, "gumbel_like", lambda x: next(drawn))


def lively(name="test_dyvm", **kwargs):
    """A small model whose images choose different patches and directions."""
    torch.manual_seed(20)
    model = timm.create_model(name, **kwargs).eval()
    for block in model.blocks:
        nn.init.normal_(block.mixer.block_head.weight)
        nn.init.zeros_(block.mixer.block_head.bias)
    for module in model.score_predictors.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.2)
    return model
