import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from semivim.ops.threads import run_tasks, scratch


@pytest.fixture(params=(1, 2, 3))
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", (1, 2, 7))
def test_ranges_cover_every_task_once(threads, count):
    ranges, names = [], set()

    def run(begin, end):
        ranges.append((begin, end))
        names.add(threading.current_thread().name)

    run_tasks(run, count)
    assert sorted(task for begin, end in ranges for task in range(begin, end)) == list(range(count))
    assert len(ranges) == min(threads, count)
    assert threading.current_thread().name in names


def test_an_error_in_any_thread_is_raised(threads):
    def run(begin, end):
        if end == 8:
            raise ArithmeticError(f"{begin}")

    with pytest.raises(ArithmeticError):
        run_tasks(run, 8)


def test_scratch_is_aligned_and_large_enough_and_a_threads_own():
    def addresses():
        return [scratch(size) for size in (100, 50, 100_000, 1)]

    with ThreadPoolExecutor(1) as other:
        theirs = other.submit(addresses).result()
        ours = addresses()
        assert all(address % 64 == 0 for address in ours + theirs)
        assert ours[0] == ours[1] and ours[2] == ours[3]
        assert abs(ours[2] - theirs[2]) >= 100_000
        for address in (ours[2], theirs[2]):
            (ctypes.c_uint8 * 100_000).from_address(address)[99_999] = 1
