import pytest
import torch.distributed as dist

from semivim.utils.process_group import in_process_group


@pytest.mark.parametrize("started", [True, False])
def test_a_process_is_in_a_group_once_that_has_started(started, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: started)
    assert in_process_group() is started


def test_pytorch_without_distributed_training_has_no_groups(monkeypatch):
    monkeypatch.setattr(dist, "is_available", lambda: False)
    monkeypatch.delattr(dist, "is_initialized")  # such a build lacks it
    assert in_process_group() is False
