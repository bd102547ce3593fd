"""Whether tensors are simply run, so that a direct path may take the place of registered ops.

A registered op costs eager mode more host time than the work of a small block (dispatch in Python, argument checks, one
autograd node each). Whatever records, traces or transforms tensors needs the ops.
"""

import torch
from torch import Tensor


def is_eager(x: Tensor) -> bool:
    """Return whether an operation on x runs at once and nothing else looks at it.

    Not so while compiling, exporting, tracing or scripting, under transforms of `torch.func`, under modes (the FLOP
    counter, fake tensors) and for subclasses of Tensor.
    """
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_torch_function_mode_enabled()
        and not torch._C._are_functorch_transforms_active()
    )
