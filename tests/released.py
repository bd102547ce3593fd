"""Checkpoints in the layout of hustvl/Vim's published files."""

import argparse
import io
from typing import Any

import torch
from torch import Tensor

from semivim.models import Vim


def released_weights(model: Vim) -> dict[str, Tensor]:
    """The model's weights in the names and the order of the release: the head before the layers."""
    state = {k.replace("blocks.", "layers."): v for k, v in model.state_dict().items()}
    state["norm_f.weight"] = state.pop("norm.weight")
    return dict(sorted(state.items(), key=lambda item: item[0].startswith(("layers.", "norm_f."))))


def released_state(model: Vim, ema: Vim) -> dict[str, Any]:
    """A whole training state: weights, EMA, AdamW's moments, schedule, scaler, epoch and arguments."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    return {
        "model": released_weights(model),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"base_values": [1e-3], "t_initial": 300, "lr_min": 1e-5, "noise_range_t": None},
        "epoch": 299,
        "model_ema": released_weights(ema),
        "scaler": {},
        "args": argparse.Namespace(model="vim", batch_size=128, opt="adamw", opt_betas=None, clip_grad=None, lr=1e-3),
    }


def as_bytes(state: dict[str, Any]) -> bytes:
    """The file that torch.save writes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
