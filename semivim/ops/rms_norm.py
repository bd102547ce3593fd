"""RMS norm over the last dimension: torch's own on a GPU, which has one kernel for it, and one kernel a pass on a CPU.

A backend is a module `norm_<name>` (listed in `backends.py`) with the functions of `norm_reference`, of the same
signatures: `unavailable`, `forward` and `backward`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import choose
from .eager import differentiable_gradients, is_eager


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.backend = choose("norm", "auto", x.device, x.dtype)
        y, scales = ctx.backend.forward(x, weight, eps)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, scales)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        if torch.is_grad_enabled():  # by create_graph: the gradients are to be differentiated themselves

            def plain(x: Tensor, weight: Tensor) -> Tensor:
                return F.rms_norm(x, weight.shape, weight, ctx.eps)

            return *differentiable_gradients(plain, [x, weight], grad), None
        return *ctx.backend.backward(grad, x, weight, scales), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, as `torch.nn.functional.rms_norm`.

    Exported, compiled and traced programs, transforms, GPUs and dtypes other than float32 get that function itself.

    Args:
        x: ``(..., d)``.
        weight: ``(d,)``.
        eps: Added to the mean square.

    Returns:
        ``(..., d)``, in the dtype of ``x``.
    """
    by_kernel = (
        is_eager(x)
        and x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and type(weight) in (Tensor, torch.nn.Parameter)
        and x.shape[-1:] == weight.shape  # torch says it best if not
        and x.numel() > 0
    )
    if not by_kernel:
        return F.rms_norm(x, weight.shape, weight, eps)
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)
    return choose("norm", "auto", x.device, x.dtype).forward(x, weight, eps)[0]
