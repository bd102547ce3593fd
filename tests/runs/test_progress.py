import pytest
import torch

from semivim.runs.progress import Progress, add_up, mean_over_ranks, sum_over_ranks


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


def test_figures_are_averaged_over_the_ranks(monkeypatch):
    mine = {"loss": torch.tensor(1.0), "batches": torch.tensor(2.0)}
    assert mean_over_ranks(mine) == mine
    other = torch.tensor([2.0, 4.0], dtype=torch.float64)  # of batches and loss
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda values: values.add_(other))
    assert mean_over_ranks(mine) == {"batches": 2.0, "loss": 2.5}
