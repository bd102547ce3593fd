"""Inputs of the convolution's tests."""

import torch
from torch import Tensor

from semivim.ops.causal_conv import causal_conv


def conv_inputs(b: int, l: int, d: int, k: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Input in a dtype, weights of both directions in float32, or all float64."""
    wide = torch.promote_types(dtype, torch.float32)
    inputs = {"x": torch.randn(b, l, d).to(dtype)}
    for end in ("", "_b"):
        inputs["weight" + end], inputs["bias" + end] = torch.randn(d, 1, k).to(wide), torch.randn(d).to(wide)
    return inputs


def pairs(weight: Tensor, bias: Tensor, weight_b: Tensor, bias_b: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The weights of both directions as `causal_conv` takes them."""
    return [(weight, bias), (weight_b, bias_b)]


def bidirectional_conv(x: Tensor, backend: str | None = None, **weights: Tensor) -> list[Tensor]:
    """Both directions as Vim's mixer convolves them."""
    return causal_conv(x, pairs(**weights), [False, True], backend)


def both_passes(module, inputs: dict[str, Tensor], grads: list[Tensor]) -> dict[str, Tensor]:
    """A backend's outputs and gradients for both directions, by name."""
    x, *weights = inputs.values()
    u, u_b = module.forward(x, pairs(*weights), [False, True])
    dx, ((dw, db), (dw_b, db_b)) = module.backward(grads, x, pairs(*weights), [False, True])
    return {"u": u, "u_b": u_b, "x": dx, "weight": dw, "bias": db, "weight_b": dw_b, "bias_b": db_b}


def run(function, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return both outputs and, by input, the gradients for fixed random gradients of the outputs."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = function(**leaves)
    grads = [torch.randn(o.shape, generator=torch.Generator().manual_seed(k)).to(o.dtype) for k, o in enumerate(out)]
    gradients = torch.autograd.grad(out, list(leaves.values()), grads)
    return {"u": out[0].detach(), "u_b": out[1].detach()} | dict(zip(leaves, gradients, strict=True))
