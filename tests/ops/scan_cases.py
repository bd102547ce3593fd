"""Inputs of the scan's tests, and what float64 makes of them."""

import functools

import torch
from torch import Tensor

from semivim.ops import Direction, available_backends, selective_scan
from semivim.ops.scan import scan

BACKENDS = [name for name, state in available_backends("cpu").items() if state.available]
LENGTHS = (1, 7, 63, 64, 197, 730)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BIDIRECTIONAL = (
    *("u", "u_b", "delta", "delta_b", "bc", "bc_b", "z"),
    *("A", "A_b", "D", "D_b", "delta_bias", "delta_bias_b"),
)


def bidirectional_inputs(
    b: int, l: int, d: int, n: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """Operands of two directions and their gate: tensors over tokens in a dtype, weights in float32, or all float64."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.promote_types(dtype, torch.float32)
    shapes = {name: (b, l, 2 * n if name.startswith("bc") else d) for name in BIDIRECTIONAL[:7]}
    inputs = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}
    inputs |= {name: -4 * torch.rand(d, n, generator=g).to(weights) for name in ("A", "A_b")}
    return inputs | {name: torch.randn(d, generator=g).to(weights) for name in BIDIRECTIONAL[9:]}


def selective_inputs(
    b: int, l: int, d: int, n: int, dtype: torch.dtype = torch.float32, bare: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """Operands of `selective_scan`, those without which it does less only if not bare."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.promote_types(dtype, torch.float32)
    shapes = {"u": (b, d, l), "delta": (b, d, l), "B": (b, n, l), "C": (b, n, l), "z": (b, d, l)}
    inputs = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}
    inputs["A"] = -4 * torch.rand(d, n, generator=g).to(weights)
    if bare:
        inputs["delta"] = inputs["delta"].abs()
        del inputs["z"]
        return inputs
    return inputs | {name: torch.randn(d, generator=g).to(weights) for name in ("D", "delta_bias")}


def mixing(b: int) -> dict[str, Tensor]:
    """Per-image weights of both ungated read-outs."""
    return {"mix": torch.rand(b, 2, generator=torch.Generator().manual_seed(7))}


def directions_of(inputs: dict[str, Tensor]) -> list[Direction]:
    """The forward and the backward direction among `bidirectional_inputs`."""
    return [
        Direction(*(inputs[name + end] for name in Direction._fields[:6]), reverse)
        for end, reverse in (("", False), ("_b", True))
    ]


def bidirectional_scan(mix: Tensor | None = None, backend: str | None = None, **inputs: Tensor) -> Tensor:
    """Both directions as Vim's mixer scans them."""
    return scan(directions_of(inputs), inputs["z"], mix, 0.5, backend=backend)


def forward_of(backend, inputs: dict[str, Tensor], mix: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output and saved values of a backend for both directions."""
    return backend.forward(directions_of(inputs), inputs["z"], mix, 0.5, True)


def gradients_of(
    backend, grad: Tensor, inputs: dict[str, Tensor], mix: Tensor | None, saved: Tensor
) -> dict[str, Tensor]:
    """A backend's gradients of `bidirectional_inputs`, by name."""
    (f, g), dz = backend.backward(grad, directions_of(inputs), inputs["z"], mix, 0.5, True, saved)
    return {
        name: dz if name == "z" else getattr(g if name.endswith("_b") else f, name.removesuffix("_b"))
        for name in inputs
    }


def run(function, inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """Return the output and, by input, the gradients for a fixed random gradient of the output."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = function(**leaves, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    gradients = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"out": out.detach()} | dict(zip(leaves, gradients, strict=True))


def in_float64(function, inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """The same by the reference in float64; the gradient of the output rounded as in `run`."""
    leaves = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    out = function(**leaves, **options, backend="reference")
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(inputs["u"].dtype).double()
    gradients = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"out": out.detach()} | dict(zip(leaves, gradients, strict=True))


@functools.cache
def expected_bidirectional(l: int, dtype: torch.dtype, mixed: bool) -> dict[str, Tensor]:
    """Float64 truth for ``bidirectional_inputs(2, l, 24, 16, dtype)``."""
    options = mixing(2) if mixed else {}
    return in_float64(bidirectional_scan, bidirectional_inputs(2, l, 24, 16, dtype), **options)


@functools.cache
def expected_selective(l: int, dtype: torch.dtype, bare: bool, reverse: bool) -> dict[str, Tensor]:
    """Float64 truth for ``selective_inputs(1, l, 20, 16, dtype, bare)``."""
    inputs = selective_inputs(1, l, 20, 16, dtype, bare)
    return in_float64(selective_scan, inputs, delta_softplus=not bare, reverse=reverse)
