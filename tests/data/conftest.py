"""Small image files to read."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def write_images(tmp_path: Path) -> Callable[[Sequence[str]], Path]:
    """Write a small RGB picture at each path below a fresh root, all of different grey."""

    def write(names: Sequence[str]) -> Path:
        root = tmp_path / "root"
        for number, name in enumerate(names):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((12, 10, 3), 10 * number, dtype=np.uint8)).save(path)
        return root

    return write
