"""Two ways to run Triton kernels without a GPU: interpret them in a child process, compile them for a GPU named.

Triton decides when it is imported whether kernels are interpreted, so a process does the one or the other.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from semivim.ops import launch_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the child process of test_in_the_interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="does not run in the interpreter")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"), compiled]


def run_in_interpreter(*arguments: str) -> None:
    """Run pytest in a child process in which Triton interprets kernels on the CPU; fail as it fails."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout + child.stderr
    assert " passed" in child.stdout, child.stdout


class CompileOnly:
    """A driver that knows a GPU's architecture and has no GPU."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int = 0) -> int:
        return 0


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def compiles(request, monkeypatch):
    """Let launches on CPU tensors compile for a GPU instead of running; the kernels, by name."""
    kernels: dict[str, CompiledKernel] = {}
    run = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        kernels[self.__name__] = run(self, *arguments, grid=grid, warmup=True, **options)
        return kernels[self.__name__]

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(CompiledKernel, "__getitem__", lambda self, grid: lambda *_: None)
    monkeypatch.setattr(launch_triton, "_kernels", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(driver, "_active", CompileOnly(request.param))
    return kernels


def assert_deterministic(kernels) -> None:
    """Fail where a kernel adds in an order that is left to chance."""
    for name, kernel in kernels.items():
        atomics = re.findall(r"\b(?:atom|red)\.\S+", kernel.asm["ptx"])
        assert not atomics, f"{name}: {atomics}"


def resources(kernel: CompiledKernel, tmp_path: Path) -> dict[str, int]:
    """Registers, bytes of stack and of shared memory that a kernel takes, by ptxas's words REG, STACK and SHARED."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    report = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return {name: int(count) for name, count in re.findall(r"\b(REG|STACK|SHARED):(\d+)", report)}
