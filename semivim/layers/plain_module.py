"""Whether a module is what its class says, so that an op may use its parameters without calling it."""

from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def _is_dense(weight: Tensor | None) -> bool:
    """Whether a weight is a tensor, not a quantised or sharded one; an export's tensors have classes of their own."""
    if type(weight) in (nn.Parameter, Tensor):
        return True
    return isinstance(weight, Tensor) and not is_traceable_wrapper_subclass(weight)


def is_plain_causal_conv(module: nn.Module) -> bool:
    """Return whether a module is a plain depthwise convolution with a bias, padded by its taps less one."""
    if not is_plain(module, nn.Conv1d):
        return False
    assert isinstance(module, nn.Conv1d)
    return (
        module._parameters.get("bias") is not None  # `module.bias` costs as much as all the rest
        and module.padding == (module.kernel_size[0] - 1,)
        and module.stride == module.dilation == (1,)
        and module.groups == module.in_channels == module.out_channels
        and module.padding_mode == "zeros"
    )


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether calling a module does nothing but its class's forward.

    It does not where somebody replaced or wrapped the module (LoRA, quantisation, a parametrisation, which change its
    class), hooked it (also weight norm), or gave it a weight that is more than a tensor.

    Args:
        module: The module.
        kind: The class whose forward is meant, exactly.
    """
    return (
        type(module) is kind
        and not (
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        )
        and not (nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks)
        and not (nn_module._global_backward_hooks or nn_module._global_backward_pre_hooks)
        and "forward" not in module.__dict__
        and _is_dense(module._parameters.get("weight"))
    )
