"""`python -m semivim` is the command `semivim`."""

import subprocess
import sys

from tests.training import ROOT


def test_module_is_the_command():
    command = [sys.executable, "-m", "semivim", "convert", "nowhere.pth", "out", "--model", "test_vim"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.startswith("semivim: error: nowhere.pth is not a readable torch file: ")
    assert done.stderr.count("\n") == 1
