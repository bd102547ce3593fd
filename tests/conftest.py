"""Shared fixtures."""

import hypothesis
import pytest
import torch

# A first draw may compile a kernel, and a loaded machine is no failure.
hypothesis.settings.register_profile("semivim", deadline=None)
hypothesis.settings.load_profile("semivim")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
