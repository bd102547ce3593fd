"""Shared fixtures, and how pytest spreads the tests over processes."""

import os

import filelock
import hypothesis
import pytest
import torch

from semivim.layers import BidirectionalMamba, RMSNorm

# A first draw may compile a kernel, and a loaded machine is no failure.
hypothesis.settings.register_profile("semivim", deadline=None)
hypothesis.settings.load_profile("semivim")


def pytest_configure() -> None:
    """Give each process one thread, and the processes that tests start too: models here are too small for more."""
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Spread the whole suite, which is what pytest runs without a path, over processes; not tests of a GPU.

    A process takes ten seconds to start, and those that share a GPU share its memory. ``-n 2`` has the last word.
    """
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword
    return None if whole and not torch.cuda.is_available() else 0


@pytest.fixture(scope="session", autouse=True)
def _kernels_compiled_once(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let the first of several processes compile the kernels, for a minute where none has yet, and the others wait.

    Numba's cache may mix up two kernels that two processes compile at once.
    """
    if not hasattr(request.config, "workerinput"):
        return
    with filelock.FileLock(tmp_path_factory.getbasetemp().parent / "kernels.lock"):
        for d_state in (1, 16):
            layers = torch.nn.Sequential(RMSNorm(8), BidirectionalMamba(8, d_state))
            for dtype in (torch.float32, torch.bfloat16):
                layers.to(dtype)(torch.randn(2, 3, 8, dtype=dtype)).sum().backward()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
