"""Launch Triton kernels at little cost to the host, and what every launch needs to know.

Triton's own launch looks at each argument again to find the compiled kernel. A caller that names all that a kernel
was compiled for finds it in a table instead and hands the arguments over as they are.
"""

from collections.abc import Iterable
from typing import Any

import torch
import triton

MOST_IMAGES = 65_535  # CUDA's limit of a grid's second and third dimension
MOST_ELEMENTS = 2**31 - 1  # of one image: offsets within an image are 32 bits wide, offsets of images 64

_kernels: dict[tuple[Any, ...], Any] = {}


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up. `triton.cdiv` costs the host as much as a small tensor."""
    return -(-a // b)


def unavailable(device: torch.device) -> str | None:
    """Return why Triton cannot run on a device, None if it can; a CPU only interprets kernels (TRITON_INTERPRET=1)."""
    if device.type == "cuda" or (device.type == "cpu" and triton.knobs.runtime.interpret):
        return None
    return f"needs a CUDA device, got {device.type}"


def check_size(images: int, elements: int) -> None:
    """Refuse what a grid or a 32-bit offset cannot address.

    Args:
        images: Images of the batch.
        elements: Elements of one image's tokens, at their largest stride.

    Raises:
        ValueError: If there are too many.
    """
    if images > MOST_IMAGES:
        raise ValueError(f"the Triton kernels take at most {MOST_IMAGES} images in a batch, got {images}")
    if elements > MOST_ELEMENTS:
        raise ValueError(f"the Triton kernels take at most {MOST_ELEMENTS} elements an image, got {elements}")


def alignment(tensors: Iterable[torch.Tensor], integers: Iterable[int]) -> tuple[bool, ...]:
    """Return what Triton specialises on: whether tensors begin at 16 bytes, integers are 1 or multiples of 16."""
    return (*[x.data_ptr() % 16 == 0 for x in tensors], *[i % 16 == 0 for i in integers], *[i == 1 for i in integers])


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    *arguments: Any,
    options: dict[str, int],
    specialized: tuple[bool, ...] = (),
    **constants: Any,
) -> None:
    """Launch a kernel that is compiled anew only for other dtypes, absent tensors, wide integers or constants.

    Where Triton specialises on values or on the alignment of a caller's tensors (it does but for its options
    ``do_not_specialize`` and ``do_not_specialize_on_alignment``), `specialized` must tell launches apart.

    Args:
        kernel: A function under ``triton.jit``.
        grid: Programs in three dimensions.
        *arguments: Tensors, None, integers and floats, in the order of the kernel's parameters. The first is a tensor
            and names the device.
        options: Triton's options of a compilation, such as ``num_warps``.
        specialized: `alignment` of what the kernel specialises on.
        **constants: The kernel's ``tl.constexpr`` parameters, which follow the others, in their order.
    """
    device = arguments[0].device
    kinds: list[torch.dtype | bool | None] = []
    values: list[Any] = []
    for x in arguments:
        if isinstance(x, torch.Tensor):
            kinds.append(x.dtype)
            values.append(x.data_ptr())  # as the driver would look up each tensor
        else:
            kinds.append(None if x is None else x > MOST_ELEMENTS)
            values.append(x)
    key = (kernel, device, *kinds, *constants.values(), *options.values(), *specialized)
    compiled = _kernels.get(key)
    if compiled is None:
        with torch.cuda.device_of(arguments[0]):
            _kernels[key] = kernel[grid](*arguments, **constants, **options)  # None while kernels are interpreted
        return
    if device.index == torch.cuda.current_device():
        compiled[grid](*values, *constants.values())
    else:
        with torch.cuda.device(device):
            compiled[grid](*values, *constants.values())
