"""Tasks of a kernel that holds no interpreter lock, spread over torch's number of threads.

Plain threads rather than a second OpenMP pool: two pools spin against each other on the same cores.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

_LINE = 64  # bytes


class _Scratch(threading.local):
    """Memory of one thread."""

    size, address, memory = 0, 0, np.empty(0, np.uint8)


_scratch = _Scratch()
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


def scratch(size: int) -> int:
    """Return the address of memory of a size in bytes, in whole cache lines, that is this thread's until it asks again.

    Kept between calls: to allocate it anew costs the host as much as to start a kernel.
    """
    if size > _scratch.size:
        _scratch.memory, _scratch.size = np.empty(size + _LINE, np.uint8), size
        _scratch.address = -(-_scratch.memory.ctypes.data // _LINE) * _LINE
    return _scratch.address
