from contextlib import nullcontext

import pytest
import torch

from semivim.data.prefetch import prefetch


def recorded(events, batches):
    for batch in batches:
        events.append(f"load {batch}")
        yield batch


def moved(events):
    def move(batch):
        events.append(f"move {batch}")
        return 10 * batch

    return move


def consume(events, batches):
    for batch in batches:
        events.append(f"use {batch}")


def test_on_a_cpu_each_batch_is_loaded_when_it_is_used():
    events = []
    consume(events, prefetch(recorded(events, [1, 2]), moved(events), torch.device("cpu")))
    assert events == ["load 1", "move 1", "use 10", "load 2", "move 2", "use 20"]


@pytest.mark.parametrize("num_batches", [0, 1, 3])
def test_on_a_gpu_the_next_batch_moves_before_this_one_is_used(monkeypatch, num_batches):
    """With streams that only note who waits for whom."""
    events = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits")

    copying, current = Stream("copy"), Stream("user")
    monkeypatch.setattr("semivim.data.prefetch._copy_stream", lambda device: copying)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    batches = range(1, num_batches + 1)
    consume(events, prefetch(recorded(events, batches), moved(events), torch.device("cuda")))
    expected = [["load 1", "copy waits", "move 1"]]
    for i in range(2, num_batches + 1):
        expected += [["user waits"], [f"load {i}", "copy waits", f"move {i}"], [f"use {i - 1}0"]]
    expected += [["user waits"], [f"use {num_batches}0"]]
    assert events == ([event for part in expected for event in part] if num_batches else [])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_arrive_whole_on_a_gpu_that_is_busy_with_the_last_one():
    """Freed memory is taken again while the user's work on it is queued; every batch still holds its own values."""
    device = torch.device("cuda")
    host = [torch.full((1 << 22,), float(i)).pin_memory() for i in range(20)]
    weight = torch.randn(4096, 4096, device=device)
    sums = []
    for batch in prefetch(host, lambda x: x.to(device, non_blocking=True).mul(2), device):
        for _ in range(5):
            weight = torch.nn.functional.normalize(weight @ weight)
        sums.append(batch.mean())
        del batch
    assert [s.item() for s in sums] == [2.0 * i for i in range(20)]
