import os
import signal

import pytest
from torch.utils.data import DataLoader

from semivim.utils.process_faults import process_fault
from semivim.utils.user_error import user_errors_end_the_program


class Killed:
    """Images whose third one kills the process that loads it, as the kernel does when memory runs out."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_a_killed_loader_process_ends_the_run_in_one_line(capsys):
    with pytest.raises(SystemExit) as stop, user_errors_end_the_program("train"):
        list(DataLoader(Killed(), num_workers=2))
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train: error: loader process ")
    assert all(word in line for word in ("memory", "/dev/shm", "--workers", "--resume auto"))


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        (
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that",
            "by signal Bus error: memory",
        ),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "loader process 7, 8 ended: memory or shared memory"),
        ("Too many open files. Communication with the workers is no longer possible.", "ulimit -n"),
        (
            "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4",
            "another process of this run has ended, or hung for --dist-timeout",
        ),
        ("mat1 and mat2 shapes cannot be multiplied", ""),
    ],
)
def test_faults_of_other_processes_are_told_from_bugs(message, wanted):
    said = process_fault(RuntimeError(message))
    assert wanted in said and bool(said) == bool(wanted)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="mat1"), user_errors_end_the_program("train"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
