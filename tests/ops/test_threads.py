import threading

import pytest
import torch

from semivim.ops.threads import aligned_scratch, run_tasks


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


def test_scratch_is_aligned_and_large_enough():
    for size in (1, 64, 1000):
        memory, address = aligned_scratch(size)
        assert address % 64 == 0
        assert memory.data_ptr() <= address
        assert address + size <= memory.data_ptr() + memory.numel()
