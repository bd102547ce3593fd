"""Tasks of a kernel that holds no interpreter lock, spread over torch's number of threads.

Plain threads rather than a second OpenMP pool: two pools spin against each other on the same cores.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_LINE = 64  # bytes

_pools: dict[int, ThreadPoolExecutor] = {}
# A forked child inherits the pool's object but none of its threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)


def run_tasks(run: Callable[[int, int], None], count: int) -> None:
    """Call ``run(begin, end)`` for consecutive ranges that cover ``range(count)``, on `torch.get_num_threads` threads.

    Results may not depend on how the tasks are cut.
    """
    threads = min(torch.get_num_threads(), count)
    if threads == 1:
        run(0, count)
        return
    if threads not in _pools:
        _pools[threads] = ThreadPoolExecutor(threads - 1, thread_name_prefix="semivim")
    bounds = [count * k // threads for k in range(threads + 1)]
    others = [_pools[threads].submit(run, *cut) for cut in zip(bounds[1:-1], bounds[2:], strict=True)]
    run(0, bounds[1])
    for other in others:
        other.result()


def aligned_scratch(size: int) -> tuple[Tensor, int]:
    """Return memory of a size in bytes and the address in it from which vectors lie in whole cache lines."""
    memory = torch.empty(size + _LINE, dtype=torch.uint8)
    return memory, -(-memory.data_ptr() // _LINE) * _LINE
