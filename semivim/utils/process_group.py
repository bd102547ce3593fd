"""Whether this process trains together with others."""

import torch.distributed as dist


def in_process_group() -> bool:
    """Whether this process is one of a group; False in a PyTorch that was built without ``torch.distributed``."""
    return dist.is_available() and dist.is_initialized()
