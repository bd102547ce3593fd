import pytest
import torch

from semivim.runs.progress import Progress
from semivim.task.run_task import RunTask


def test_progress_goes_through_the_tasks_state():
    task, other = RunTask(torch.nn.Linear(2, 1), Progress(num_updates=7)), RunTask(torch.nn.Linear(2, 1))
    other.load_task_state(None)
    assert other.progress == Progress()
    other.load_task_state(task.get_task_state())
    assert other.progress == Progress(num_updates=7)
    with pytest.raises(KeyError, match="progress"):
        other.load_task_state({})


def test_compiled_model_trains_evaluates_and_saves_under_its_plain_names():
    model = torch.nn.Linear(2, 1)
    task = RunTask(model)
    compiled = task.compile(backend="eager")
    assert compiled is not model and task.trainable_module is task.get_eval_model() is compiled
    assert torch.equal(compiled(torch.ones(1, 2)), model(torch.ones(1, 2)))
    assert set(task.get_checkpoint_state()["state_dict"]) == {"weight", "bias"}
