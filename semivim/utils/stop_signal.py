"""SIGTERM and SIGINT, by which a batch system or Ctrl-C asks a run to end."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from semivim.utils.process_group import in_process_group

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SAME_REQUEST_S = 1.0  # torchrun passes on what the terminal has sent to every process already


class StopSignal:
    """Within the block, the first signal is noted, for the run to end by itself; a second one ends the process at once.

    Args:
        device: Where ranks exchange what they have noted.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.noted, self._noted_s = 0, 0.0
        self._process = os.getpid()
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # Python lets no other set a handler
            self._earlier = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def asked(self) -> int:
        """Number of the signal that any rank has noted, 0 for none; all ranks must call this after the same update."""
        if not in_process_group():
            return self.noted
        noted = torch.tensor(self.noted, device=self.device)
        dist.all_reduce(noted, op=dist.ReduceOp.MAX)
        return int(noted)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a child that was forked within the block
            return
        now_s = time.monotonic()
        if not self.noted:
            self.noted, self._noted_s = number, now_s
            _write(f"{signal.Signals(number).name}: ending after this update; once more ends at once\n")
        elif now_s - self._noted_s > _SAME_REQUEST_S:
            for child in multiprocessing.active_children():
                child.kill()
            signal.signal(number, signal.SIG_DFL)
            os.kill(self._process, number)


def leave_signals_to_the_parent(_worker: int) -> None:
    """Keep a loader process alive through signals to the whole process group, until its parent ends it.

    Args:
        _worker: Number of the loader process, as ``DataLoader`` gives it to its ``worker_init_fn``.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        # blocked here, and taken by a thread that can tell whose signal it is
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)


def _write(text: str) -> None:
    # not by sys.stderr, which the signal may have interrupted in a write
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())
