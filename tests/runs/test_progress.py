import pickle

import pytest
import torch

from semivim.runs.progress import Progress, add_over_ranks, add_up, sum_over_ranks


def test_updates_add_up_in_the_interval_and_in_the_epoch():
    progress = Progress()
    for value in (1.0, 2.0):
        progress.add({"loss": torch.tensor(value)})
    progress.interval = {}
    progress.add({"loss": torch.tensor(4.0), "kept": torch.tensor(3.0)})
    assert progress.num_updates == 3
    assert progress.interval == {"loss": 4.0, "kept": 3.0}
    assert progress.epoch == {"loss": 7.0, "kept": 3.0}
    progress.epoch = {}
    assert progress.run == {"loss": 7.0, "kept": 3.0}


def test_state_goes_through_a_file(tmp_path):
    progress = Progress(num_updates=7, num_epochs=2, unreadable={5: 1}, schedule={"restore_lr": [0.1]})
    progress.add({"loss": torch.tensor(4.0)})
    torch.save(progress.state_dict(), tmp_path / "p.pt")
    other = Progress()
    other.load_state_dict(torch.load(tmp_path / "p.pt", weights_only=True))
    assert other == progress
    with pytest.raises(KeyError, match="schedule"):
        other.load_state_dict({k: v for k, v in progress.state_dict().items() if k != "schedule"})


def test_restart_moves_to_an_epoch_and_forgets_the_sums():
    progress = Progress(num_updates=7, num_epochs=2, unreadable={5: 1})
    progress.add({"loss": torch.tensor(4.0)})
    progress.restart(num_epochs=5, updates_per_epoch=3)
    assert (progress.num_epochs, progress.num_updates, progress.interval, progress.epoch) == (5, 15, {}, {})
    assert progress.unreadable == {5: 1}


def test_ramp_rises_from_the_first_update_to_the_last():
    assert [Progress(num_updates=n).ramp(4) for n in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert Progress().ramp(0) == 1.0


def test_sums():
    sums = {}
    add_up(sums, {"a": torch.tensor(1.0)})
    add_up(sums, {"a": torch.tensor(2.0), "b": torch.tensor(5.0)})
    assert sums == {"a": 3.0, "b": 5.0}
    assert sum_over_ranks({3: 2}) == {3: 2}


def of_rank(rank, monkeypatch, other):
    """Be one of two processes over NCCL; ``other`` gives of one's own object what the other process passes."""

    def all_gather_object(parts, mine):
        parts[:] = pickle.loads(pickle.dumps([mine, other(mine)]))

    def all_reduce(value):
        assert value.device.type == "cuda", "No backend type associated with device type cpu"

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: rank)
    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    monkeypatch.setattr("torch.distributed.all_gather_object", all_gather_object)


def test_figures_are_added_over_the_ranks(monkeypatch):
    mine = {"loss": torch.tensor(1.0), "batches": torch.tensor(2.0)}
    assert add_over_ranks(mine) == mine
    of_rank(0, monkeypatch, lambda mine: {name: value + 3 * (name == "loss") for name, value in mine.items()})
    assert add_over_ranks(mine) == {"batches": 4.0, "loss": 5.0}
    assert add_over_ranks({}) == {}


@pytest.mark.parametrize("rank", [0, 1])
def test_checkpoint_holds_the_sums_of_all_ranks_and_no_rank_counts_them_twice(rank, monkeypatch):
    of_rank(rank, monkeypatch, lambda mine: {"kept": mine["kept"] + torch.tensor([2.0, 3.0])} if "kept" in mine else {})
    progress = Progress()
    progress.add({"kept": torch.tensor([1.0, 2.0])})
    progress.gather({7: 1})
    expected = [4.0, 7.0] if rank == 0 else [0.0, 0.0]
    assert progress.unreadable == {7: 1}
    saved = Progress(interval={"kept": torch.tensor([4.0, 7.0])}, run={"kept": torch.tensor([4.0, 7.0])}, epoch={})
    resumed = Progress()
    resumed.load_state_dict(saved.state_dict())
    for sums in (progress.interval, progress.epoch, progress.run, resumed.interval, resumed.run):
        assert sums["kept"].tolist() == expected
    assert resumed.epoch == {}


def test_run_that_resumes_with_no_step_left_adds_the_sums_of_its_checkpoint(monkeypatch):
    saved = Progress(num_updates=3, epoch={"kept": torch.tensor([4.0, 7.0])}, run={"kept": torch.tensor([4.0, 7.0])})
    of_rank(0, monkeypatch, lambda mine: {name: torch.zeros_like(value) for name, value in mine.items()})
    resumed = Progress()
    resumed.load_state_dict(saved.state_dict())
    resumed.gather({})  # before its evaluation
    assert add_over_ranks(resumed.epoch)["kept"].tolist() == add_over_ranks(resumed.run)["kept"].tolist() == [4.0, 7.0]


def test_sums_of_a_checkpoint_go_to_the_device_of_the_figures():
    sums = {"kept": torch.ones(2)}
    add_up(sums, {"kept": torch.ones(2, device="meta")})
    assert sums["kept"].device.type == "meta"
