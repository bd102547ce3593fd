"""The one table of tolerances, per claim; never loosened by environment."""

import torch

# name -> (relative to the largest value, absolute)
TOLERANCE = {
    "float32": (1e-5, 1e-7),
    "float32_grad": (1e-4, 1e-6),
    "float64": (1e-12, 1e-14),
    "bfloat16": (3e-2, 1e-3),
    "float16": (5e-3, 1e-4),
}


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: str = "float32") -> None:
    """Fail, naming the tensor, where max|a-b| exceeds rel * max|b| + abs."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, wanted {tuple(expected.shape)}"
    rel, absolute = TOLERANCE[tolerance]
    a, b = actual.detach().double(), expected.detach().double()
    error = (a - b).abs().max().item() if a.numel() else 0.0
    limit = rel * b.abs().max().item() + absolute if b.numel() else 0.0
    assert error <= limit, f"{name}: max error {error:.3e} > {limit:.3e} ({tolerance})"


def sampled(x: torch.Tensor) -> torch.Tensor:
    """The values of a gradient that the recorded ones hold: all of up to 512, else every seventh."""
    return x.flatten()[:: 7 if x.numel() > 512 else 1]
