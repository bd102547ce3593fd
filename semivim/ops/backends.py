"""Which implementation runs an op: choice by device, by name, by block or by environment.

A backend `name` of the op `scan` is the module `scan_<name>`, of `conv` and `norm` likewise; `scan.py`,
`causal_conv.py` and `rms_norm.py` say which functions it holds. It may import its package at its top: modules are
imported when they are first asked for.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch


class _Backend(NamedTuple):
    package: str
    devices: tuple[str, ...]  # where the automatic choice considers it


class _Block:
    """One `use_backend` block, told from others of the same name by identity."""

    def __init__(self, name: str) -> None:
        self.name = name


# In the order of preference of the automatic choice.
_BACKENDS = {
    "triton": _Backend("triton", ("cuda",)),
    "cuda": _Backend("mamba_ssm", ("cuda",)),
    "numba": _Backend("numba", ("cpu",)),
    "reference": _Backend("torch", ()),
}
_blocks: list[_Block] = []


def _module(op: str, name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{op}_{name}")


def _unavailable(op: str, name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Return why a backend cannot run an op on a device, None if it can."""
    backend = _BACKENDS[name]
    if dtype == torch.float64 and name != "reference":
        return "only the reference keeps float64"
    if importlib.util.find_spec(backend.package) is None:
        return f"package {backend.package} is not installed"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    try:
        module = _module(op, name)
    except ImportError as error:
        return f"its import fails: {error}"
    return module.unavailable(device)


def _automatic(op: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    for name, backend in _BACKENDS.items():
        if device.type in backend.devices and not _unavailable(op, name, device, dtype):
            return name
    return "reference"


class BackendState(NamedTuple):
    """Whether a backend of the scan can run."""

    available: bool
    chosen_for: tuple[str, ...]  # types of devices for which it is chosen
    reason: str | None  # why it cannot run

    def __str__(self) -> str:
        if not self.available:
            return str(self.reason)
        return f"available, chosen for {' and '.join(self.chosen_for)}" if self.chosen_for else "available"


def available_backends(device: str | torch.device | None = None) -> dict[str, BackendState]:
    """Say for each backend of the scan whether it can run.

    Args:
        device: Where it would run; the CPU and, if there is one, the first GPU when not given.

    Returns:
        The state of each backend by its name, in the order of preference; ``str(state)`` is a sentence.

    Raises:
        ValueError: If the environment asks for a backend that does not exist.
    """
    devices = [torch.device("cpu" if device is None else device)]
    if device is None and torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    report = {}
    for name in _BACKENDS:
        reasons = [_unavailable("scan", name, place) for place in devices]
        available = None in reasons
        chosen = tuple(place.type for place in devices if available and resolve("scan", "auto", place) == name)
        reason = None if available else "; ".join(dict.fromkeys(str(r) for r in reasons))
        report[name] = BackendState(available, chosen, reason)
    return report


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Let scans called with ``backend=None`` use a named backend inside the block, and what it can run beside them.

    Convolutions, and norms of models that run eagerly, take the automatic choice where the named backend lacks them.
    The name is read when an op runs, so it also holds inside scripted, traced and compiled models. It is shared by all
    threads and takes precedence over the environment variable ``SEMIVIM_BACKEND``.

    Args:
        name: One of `available_backends`.

    Raises:
        ValueError: If the name is unknown.
    """
    _check_name(name)
    block = _Block(name)
    _blocks.append(block)
    try:
        yield
    finally:
        _blocks.remove(block)


def _check_name(name: str) -> None:
    if name not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(_BACKENDS)}; got {name!r}")


def _wanted(backend: str) -> str:
    """Return the name asked for by the argument, by `use_backend` or by the environment, or "auto"."""
    if backend == "auto":
        backend = _blocks[-1].name if _blocks else os.environ.get("SEMIVIM_BACKEND") or "auto"
    if backend != "auto":
        _check_name(backend)
    return backend


def resolve(op: str, backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Return the name of the backend that is to run an op, whether or not it can.

    Args:
        op: ``"scan"``, ``"conv"`` or ``"norm"``.
        backend: A name, or ``"auto"`` for `use_backend`'s, the environment's or the automatic choice.
        device: Where the tensors are.
        dtype: Of the main input.

    Raises:
        ValueError: If the name is unknown.
    """
    wanted = _wanted(backend)
    asked_by_argument = backend != "auto"
    if wanted == "auto" or (op != "scan" and not asked_by_argument and _unavailable(op, wanted, device, dtype)):
        return _automatic(op, device, dtype)
    return wanted


def choose(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """Return the module that runs an op; arguments as of `resolve`.

    Raises:
        ValueError: If the name is unknown or that backend cannot run.
    """
    return _chosen(op, backend, _wanted(backend), device.type, dtype)


# What can run does not change within a process, and asking costs more than a small scan.
@functools.cache
def _chosen(op: str, backend: str, wanted: str, device_type: str, dtype: torch.dtype) -> ModuleType:  # noqa: ARG001
    device = torch.device(device_type)
    name = resolve(op, backend, device, dtype)
    reason = _unavailable(op, name, device, dtype)
    if reason:
        raise ValueError(f"backend {name!r} cannot run the {op} on {device.type}: {reason}")
    return _module(op, name)


def resolved_module(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """Return the module that `resolve` names, whether or not it can run; arguments as of `resolve`."""
    return _module(op, resolve(op, backend, device, dtype))


def of_forward(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend of an op's backward: the forward's, whatever `use_backend` says by then.

    What a forward saves can be read by its own backward only. A compiled program keeps the choice open, as its
    forward does.
    """
    return backend if torch.compiler.is_compiling() else resolve(op, backend, device, dtype)
