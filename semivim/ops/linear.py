"""The product of tokens and a weight matrix, by oneDNN on processors where that is faster than torch's own.

torch gives float32 matrix products on an x86 CPU to MKL, which leaves the AVX-512 of AMD processors unused, and
convolutions to oneDNN, which uses all vector instructions of any processor. A product is a convolution of width one
over an image whose pixels are the tokens, channel-last, so nothing is copied. On Intel processors MKL is faster at
every size. `benchmarks/scan.py --products` measures both; `benchmarks/README.md` has the table by vendor and size.
"""

import math
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .eager import is_transformed

# Below this many rows or columns, transposing both operands of the weight's gradient costs more than the product gains.
_NARROW = 64
# Multiply-adds from which oneDNN's product is the faster one, by vendor and instruction set of the processor; below
# them the host's time for a convolution outweighs the gain. Everywhere else torch's own product is at least as fast.
_LEAST_WORK_OF = {("AuthenticAMD", "AVX512"): 1 << 24}


def vendor() -> str:
    """Return the vendor's name that the processor gives, "" where it is not known."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else platform.processor()
    return next((name for name in ("AuthenticAMD", "GenuineIntel") if name in text), "")


def least_work() -> float:
    """Return from how many multiply-adds on this machine's oneDNN computes a product, infinity if never."""
    if not torch.backends.mkldnn.is_available():
        return math.inf
    return _LEAST_WORK_OF.get((vendor(), torch.backends.cpu.get_cpu_capability()), math.inf)


_LEAST_WORK = least_work()


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight.T`` of ``(t, i)`` and ``(o, i)``, both contiguous, as a convolution."""
    pixels = x.view(1, 1, *x.shape).permute(0, 3, 1, 2)
    # A stride along the dimension of size one changes nothing but torch's choice: without one it takes its own kernel,
    # and thereby MKL, for a single image on a single thread.
    return F.conv2d(pixels, weight[:, :, None, None], stride=(2, 1)).permute(0, 2, 3, 1).reshape(x.shape[0], -1)


class _Linear(torch.autograd.Function):
    """Gradients by the same product; torch's own backward of a convolution is slower than MKL for few images."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return _product(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = linear(grad, weight.t())
        if ctx.needs_input_grad[1]:
            dweight = grad.t() @ x if min(weight.shape) < _NARROW else linear(grad.t(), x.t())
        return dx, dweight


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight.T`` of ``(t, i)`` and ``(o, i)``, both contiguous, by oneDNN both ways."""
    return _Linear.apply(x, weight)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN computes a product: plain, large float32 tensors of a CPU, run and not recorded or transformed."""
    return (
        not math.isinf(_LEAST_WORK)
        and isinstance(x, Tensor)  # torch.fx passes what stands for one
        and not is_transformed()
        and not (torch.jit.is_tracing() or torch.compiler.is_exporting() or torch.is_autocast_enabled("cpu"))
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and type(weight) in (Tensor, torch.nn.Parameter)  # quantised and sharded weights bring their own product
        and x.shape[-1] == weight.shape[-1]  # torch says it best if not
        and x.numel() * weight.shape[0] >= max(1, _LEAST_WORK)
    )


def add_product(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Add ``x @ weight`` to a total, in place, and return it.

    Args:
        total: ``(t, i)``, contiguous.
        x: ``(t, o)``; in another dtype than the total, the product is computed in that dtype.
        weight: ``(o, i)``.
    """
    if total.dtype != x.dtype or _by_onednn(x, weight.t()):
        return total.add_(linear(x, weight.t()))
    return total.addmm_(x, weight)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight.T``, as `torch.nn.functional.linear` up to rounding.

    Exported and traced programs, autocast, other devices and dtypes get that function itself.

    Args:
        x: ``(..., i)``.
        weight: ``(o, i)``.

    Returns:
        ``(..., o)``.
    """
    if not _by_onednn(x, weight):
        return F.linear(x, weight)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if not torch.is_grad_enabled():
        return _product(rows, weight.contiguous()).view(*x.shape[:-1], -1)
    return product(rows, weight.contiguous()).view(*x.shape[:-1], -1)
