"""What the scripts of tests with several processes share."""

import torch
import torch.distributed as dist
from torch import nn


def assert_same_on_all_ranks(model: nn.Module) -> None:
    """The weights of every rank are those of rank 0, to the bit."""
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    first = mine.clone()
    dist.broadcast(first, 0)
    assert torch.equal(mine, first), f"weights of rank {dist.get_rank()} differ"
