import os
import signal
import subprocess
import sys
import time

import pytest

from semivim.utils.stop_signal import StopSignal
from tests.training import ROOT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_is_noted_and_the_handlers_go_with_the_block(number, capfd):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert stop.asked() == 0
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # the terminal's, passed on by a launcher
        assert stop.asked() == number
    assert signal.getsignal(number) is before
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"{number.name}: ending after this update; once more ends at once"


SECOND = """
import time, torch
from torch.utils.data import DataLoader
from semivim.utils.stop_signal import StopSignal, leave_signals_to_the_parent
batches = iter(DataLoader(range(10**6), num_workers=1, worker_init_fn=leave_signals_to_the_parent))
next(batches)
with StopSignal() as stop:
    print(batches._workers[0].pid, flush=True)
    while not stop.asked():
        time.sleep(0.01)
    for _ in range(20):
        next(batches)
    print("noted", flush=True)
    while True:
        time.sleep(1)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_the_group_leaves_loaders_and_a_second_ends_all_at_once(number):
    process = subprocess.Popen(
        [sys.executable, "-c", SECOND], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    worker = int(process.stdout.readline())
    os.killpg(process.pid, number)
    assert process.stdout.readline() == b"noted\n"  # batches still came after the signal
    time.sleep(1.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == -number
    assert len(err.splitlines()) == 1, err
    deadline = time.monotonic() + 3
    while os.path.exists(f"/proc/{worker}") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{worker}")
