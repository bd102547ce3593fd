"""The product of tokens and a weight matrix, by oneDNN where torch would take MKL.

torch gives float32 matrix products on an x86 CPU to MKL, which leaves the AVX-512 of AMD processors unused, and
convolutions to oneDNN, which uses all vector instructions of any processor. A product is a convolution of width one
over an image whose pixels are the tokens, channel-last, so nothing is copied. `benchmarks/scan.py` measures both.
"""

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .eager import is_transformed

# Below this many rows or columns, transposing both operands of the weight's gradient costs more than the product gains.
_NARROW = 64
_X86 = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()


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


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN computes a product: plain float32 tensors of an x86 CPU, run and not recorded or transformed."""
    return (
        _X86
        and isinstance(x, Tensor)  # torch.fx passes what stands for one
        and not is_transformed()
        and not (torch.jit.is_tracing() or torch.compiler.is_exporting() or torch.is_autocast_enabled("cpu"))
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and type(weight) in (Tensor, torch.nn.Parameter)  # quantised and sharded weights bring their own product
        and x.numel() > 0
        and x.shape[-1] == weight.shape[-1]
        and weight.numel() > 0  # torch says it best if not
    )


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
    return _Linear.apply(rows, weight.contiguous()).view(*x.shape[:-1], -1)
