"""Damaged files of every kind that is read from elsewhere: each reader returns, or raises its documented error.

Usage: OMP_NUM_THREADS=1 python benchmarks/fuzz.py

The documented error is a UserError (that an unreadable image raises one of its own is a UserError too) with one line
that names the file. Anything else is printed with the seed of its case, and the exit status is 1: another exception, a
message of several lines or without the file, a case that takes over 60 s or over 1 GiB. ``--kinds KIND --seed SEED
--cases 1`` repeats one case.
"""

import argparse
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from types import FrameType
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the checkout's own package and scripts
from benchmarks.fuzz_cases import KINDS, Case, Kind
from semivim.utils.user_error import UserError

LIMIT_S = 60.0
LIMIT_BYTES = 2**30


class Fault(NamedTuple):
    """A case that its reader neither takes nor refuses in the documented way."""

    seed: int
    what: str  # the exception, one line
    trace: str


class Result(NamedTuple):
    """What the readers of one kind did."""

    accepted: int
    refused: int
    faults: list[Fault]


class UndocumentedError(Exception):
    """A reader does what its documentation does not say."""


class _TooSlowError(BaseException):
    """Not an Exception, which a reader might take for damage."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise _TooSlowError(f"it takes over {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak_bytes() -> int:
    """Most memory that this process has held at a time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def is_accepted(case: Case, limit_s: float = LIMIT_S) -> bool:
    """Whether the reader of a case takes its file, and does not refuse it.

    Raises:
        BaseException: If it does neither in the documented way.
    """
    before = peak_bytes()
    try:
        with _time_limit(limit_s):
            case.read()
    except UserError as error:
        message = str(error)
        if "\n" in message:
            raise UndocumentedError(f"a message of several lines: {message!r}") from error
        if not any(name in message for name in case.named):
            raise UndocumentedError(f"a message without {' or '.join(case.named)}: {message!r}") from error
        accepted = False
    else:
        accepted = True
    taken = peak_bytes() - before
    if taken > LIMIT_BYTES:
        raise UndocumentedError(f"it takes {taken:,} bytes")
    return accepted


def fuzz(name: str, kind: Kind, num_cases: int, seed: int = 0, limit_s: float = LIMIT_S) -> Result:
    """Read the damaged files of one kind.

    Args:
        name: Of the kind; cases of two kinds with one seed are not alike.
        kind: One of ``KINDS``, or like one.
        num_cases: Number of cases.
        seed: Of the first case; each one's is one more than that before it.
        limit_s: Seconds that a case may take.
    """
    accepted, faults = 0, []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's about damaged files
        make = kind(Path(folder))
        for number in range(seed, seed + num_cases):
            torch.manual_seed(0)
            case = make(Random(f"{name} {number}"))
            try:
                accepted += is_accepted(case, limit_s)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # noqa: BLE001  all that is not documented
                what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                faults.append(Fault(number, what, traceback.format_exc()))
    return Result(accepted, num_cases - accepted - len(faults), faults)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the counts of every kind and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0, help="of the first case of each kind")
    args = parser.parse_args(argv)
    num_faults = 0
    for name in args.kinds:
        start = time.process_time()
        result = fuzz(name, KINDS[name], args.cases, args.seed)
        num_faults += len(result.faults)
        print(
            f"{name}: {args.cases:,} cases, {result.accepted:,} accepted, {result.refused:,} refused with the "
            f"documented error, {len(result.faults):,} undocumented, {time.process_time() - start:.0f} s",
            flush=True,
        )
        for fault in result.faults:
            print(f"  --kinds {name} --seed {fault.seed} --cases 1: {fault.what}")
            if args.cases == 1:
                print(fault.trace)
    return 1 if num_faults else 0


if __name__ == "__main__":
    sys.exit(main())
