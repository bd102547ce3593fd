"""Faults of the processes that a run is made of: what PyTorch raises, in the user's words."""

import re

_KILLED = r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: (\w[\w ]*)|exited unexpectedly)"
_PEER = r"gloo/transport|ProcessGroup\w*|Connection (?:closed|reset) by peer|NCCL error|Watchdog caught collective"


def process_fault(error: BaseException) -> str:
    """Say in one line what happened where another process of the run is to blame, '' for any other error.

    PyTorch raises a plain RuntimeError, wherever the program is when it learns of the fault.
    """
    text = " ".join(str(error).split())
    if match := re.search(_KILLED, text):
        how = f"was ended by signal {match[2].strip()}" if match[2] else "ended"
        return (
            f"loader process {match[1]} {how}: memory or shared memory (/dev/shm) may be full: give fewer "
            "-j/--workers, and go on with --resume auto"
        )
    if "Too many open files" in text:
        return "too many open files: raise the limit (ulimit -n) or give fewer -j/--workers; go on with --resume auto"
    if re.search(_PEER, text):
        return (
            f"another process of this run has ended, or hung for --dist-timeout: see its own message; go on with "
            f"--resume auto ({text[:150]})"
        )
    return ""
