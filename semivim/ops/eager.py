"""How tensors are run: simply, so that a direct path may take the place of registered ops, or under a transform.

A registered op costs eager mode more host time than the work of a small block (dispatch in Python, argument checks, one
autograd node each). Whatever records or traces tensors needs the ops; whatever transforms them needs plain torch.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in a dtype; asking first costs a tenth of a call of `to` that has nothing to do."""
    return x if x.dtype is dtype else x.to(dtype)


def deliver(x: Tensor, dtype: torch.dtype, into: Tensor | None) -> Tensor:
    """Return a result in a dtype, or in the memory that is meant for it."""
    if into is None:
        return cast(x, dtype)
    return x if x is into else into.copy_(x)


def is_eager(x: Tensor) -> bool:
    """Return whether an operation on x runs at once and nothing else looks at it.

    Not so while compiling, exporting, tracing or scripting, under transforms, under modes (the FLOP counter, fake
    tensors), for subclasses of Tensor and on other devices than a CPU or a GPU (meta tensors hold nothing).
    """
    return (
        type(x) is Tensor
        and (x.is_cpu or x.is_cuda)
        and not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_torch_function_mode_enabled()
        and not is_transformed()
    )


def is_transformed() -> bool:
    """Return whether a transform of `torch.func` (grad, vmap, jvp, ...) or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def differentiable_gradients(
    function: Callable[..., Tensor | list[Tensor]], tensors: list[Tensor], grads: Tensor | list[Tensor]
) -> list[Tensor | None]:
    """Return the gradients of a function of tensors, as tensors that can be differentiated again.

    Args:
        function: Computes the outputs in torch operations that can be differentiated twice.
        tensors: Its arguments; one may have been computed from another.
        grads: Gradients of the outputs.

    Returns:
        A gradient for each argument, None for those that need none.
    """
    # Views, so that the gradient of an argument leaves out its way through an argument computed from it.
    arguments = [x.view_as(x) for x in tensors]
    needed = [x for x in arguments if x.requires_grad]
    outputs = function(*arguments)
    gradients = iter(torch.autograd.grad(outputs, needed, grads, create_graph=True, allow_unused=True))
    return [next(gradients) if x.requires_grad else None for x in arguments]
