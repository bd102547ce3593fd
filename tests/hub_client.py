"""A client of the local Hub in a process of its own, as huggingface_hub reads its environment when imported."""

import atexit
import contextlib
import functools
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hub_server import HubServer

_ROOT = Path(__file__).parent.parent


@dataclass
class Answer:
    """What a piece of code left in ``result``, or the error it ended with, and what it wrote."""

    result: Any
    error: str
    stdout: str
    stderr: str
    seconds: float

    @property
    def line(self) -> str:
        """The error, once seen that it is one line and that it came soon."""
        assert self.error and "\n" not in self.error, self.error
        assert self.seconds < 25, self.seconds
        return self.error


class HubClient:
    """Runs Python code in a child process that talks to ``endpoint``; starts it on first use."""

    def __init__(self, endpoint: str, home: Path, imports: str = "semivim.models") -> None:
        self.imports = imports
        # one second of patience with a server that hangs
        waits = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
        quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        account = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_write",
        }
        threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
        self.env = {**os.environ, **waits, **quiet, **account, **threads, "NO_PROXY": "127.0.0.1,localhost"}

    @functools.cached_property
    def child(self) -> subprocess.Popen:
        command = [sys.executable, "-m", "tests.hub_client", self.imports]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=self.env, cwd=_ROOT)

    def __enter__(self) -> "HubClient":
        return self

    def __exit__(self, *_: object) -> None:
        assert self.child.stdin and self.child.stdout
        self.child.stdin.close()
        self.child.stdout.close()
        self.child.wait(30)

    def run(self, code: str, **values: Any) -> Answer:
        """Run code with ``values`` as its variables."""
        assert self.child.stdin and self.child.stdout
        self.child.stdin.write(json.dumps({"code": code, "values": values}) + "\n")
        self.child.stdin.flush()
        return Answer(**json.loads(self.child.stdout.readline()))

    def cli(self, *argv: str | Path) -> Answer:
        """Run the command `semivim`; ``result`` is its exit status, ``error`` what it wrote on a failure."""
        answer = self.run(
            "from semivim.cli import main\ntry:\n    main(argv)\n    result = 0\nexcept SystemExit as stop:\n"
            "    result = stop.code",
            argv=[str(word) for word in argv],
        )
        if answer.result == 2 and not answer.error:
            answer.error = answer.stderr.rstrip("\n")
        return answer


@functools.cache
def shared_hub() -> HubServer:
    """One server for all test files; its thread ends with the process."""
    return HubServer().__enter__()


@functools.cache
def shared_home() -> Path:
    """HF_HOME of the shared clients."""
    folder = tempfile.mkdtemp(prefix="semivim-hub-")
    atexit.register(shutil.rmtree, folder)
    return Path(folder)


@functools.cache
def shared_client() -> HubClient:
    """One client with write access for all test files, ended with the process."""
    client = HubClient(shared_hub().url, shared_home())
    atexit.register(client.__exit__)
    return client


def _serve() -> None:
    """Read JSON lines of code from the input, run them, answer with JSON lines."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        values, error = job["values"], ""
        out, err, start = io.StringIO(), io.StringIO(), time.perf_counter()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                exec(job["code"], values)
            except Exception as failure:  # noqa: BLE001
                # every failure belongs to the test that asked, not to this loop
                error = f"{type(failure).__name__}: {failure}"
                traceback.print_exc(file=err)
        seconds = time.perf_counter() - start
        answer = Answer(values.get("result"), error, out.getvalue(), err.getvalue(), seconds)
        answers.write(json.dumps(vars(answer)) + "\n")
        answers.flush()


if __name__ == "__main__":
    if sys.argv[1]:
        importlib.import_module(sys.argv[1])
    _serve()
