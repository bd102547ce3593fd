"""Hold the options of a model against the model, without memory for its weights, before it is built."""

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import timm
import torch
from timm.models import get_pretrained_cfg, split_model_name_tag
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from semivim.utils.user_error import UserError, one_line, short


class Limit(NamedTuple):
    """What parameters and buffers of a model may hold; by default 8 GiB in float32, more than nearly all of timm's."""

    elements: int = 2**31
    tensors: int = 10_000


NO_WEIGHTS_LIMIT = Limit()
MAX_CLASSES = 2**17  # ImageNet-21k has 21,841


class _TooLargeError(Exception):
    """A model that is being built is over its limit."""


def did_you_mean_model(name: str) -> str:
    """The models of timm nearest to an unknown name, as the end of an error."""
    near = difflib.get_close_matches(split_model_name_tag(name)[0], timm.list_models(), n=3)
    return f"; did you mean {', '.join(near)}?" if near else ""


def check_name(name: str, what: str) -> None:
    """Refuse a name, with its tag, that timm does not know.

    Raises:
        UserError: With the nearest names.
    """
    if not timm.is_model(name):
        raise UserError(f"{what}: no such model of timm{did_you_mean_model(name)}")
    try:
        get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = ", ".join(timm.list_pretrained(f"{split_model_name_tag(name)[0]}.*")) or "none"
        raise UserError(f"{what}: {one_line(error)}; with weights: {tags}") from error


def check_options(
    name: str,
    options: Mapping[str, Any],
    what: str,
    limit: Limit = NO_WEIGHTS_LIMIT,
    architecture: str | None = None,
) -> nn.Module:
    """Refuse options that a model does not take, or that make it too large; both would be the user's or a file's fault.

    Args:
        name: A model of timm, or the folder of one.
        options: Arguments of ``timm.create_model``, without weights.
        what: What an error calls the options.
        limit: Above it the model is too large.
        architecture: The model of timm that the folder's config names; None for a model of timm.

    Returns:
        The model without memory for its weights.

    Raises:
        UserError: If the model fails with the options or the folder's config and not without, or is too large.
        Exception: Whatever the model raises without too, which is a bug of the model's.
    """
    try:
        return _build_without_memory(name, options, limit)
    except _TooLargeError as error:
        raise UserError(f"{what}: {error}") from error
    except Exception as error:
        try:
            _build_without_memory(architecture or name, {}, NO_WEIGHTS_LIMIT)
        except Exception:  # noqa: BLE001  whatever the bug raises
            raise error from None
        raise UserError(f"{what}: {one_line(error)}") from error


def _build_without_memory(name: str, options: Mapping[str, Any], limit: Limit) -> nn.Module:
    with torch.device("meta"), _limited(limit):
        return timm.create_model(name, **options)


@contextmanager
def _limited(limit: Limit) -> Iterator[None]:
    """Stop the construction of a model at its limit, so that a depth of a million ends soon."""
    elements = tensors = 0

    def add(_module: nn.Module, name: str, value: Tensor | None) -> None:
        nonlocal elements, tensors
        if value is None:
            return
        elements, tensors = elements + value.numel(), tensors + 1
        if elements > limit.elements or tensors > limit.tensors:
            raise _TooLargeError(
                f"the model is over the limit of {limit.elements:,} numbers in {limit.tensors:,} tensors, with {name} "
                f"of {'x'.join(map(str, value.shape))}"
            )

    hooks = [register_module_parameter_registration_hook(add), register_module_buffer_registration_hook(add)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_numbers(value: Any, largest: int, what: str) -> None:
    """Refuse a whole number over a limit anywhere in nested lists and mappings.

    A model may loop, or make a list, as long as a number says before it has any parameter.

    Raises:
        UserError: If there is one.
    """
    if isinstance(value, Mapping):
        for key, part in value.items():
            check_numbers(part, largest, f"{what}.{key}")
    elif isinstance(value, list | tuple):
        for part in value:
            check_numbers(part, largest, what)
    elif isinstance(value, int | float) and abs(value) > largest:
        raise UserError(f"{what} is {short(value)}, wanted at most {largest:,}")
