"""Files written whole or not at all, and files read without trusting them."""

import errno
import os
import shutil
import struct
import warnings
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load

from semivim.utils.checksum import check_seal
from semivim.utils.user_error import UserError, did_you_mean_file, one_line


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path whose file replaces ``path`` when the block ends, or vanishes if the block raises.

    A reader sees the old file or the whole new one, also after a power cut: file and folder are flushed to disk.
    """
    final = Path(path)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, final)
        flush(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def full_disk_is_one_line(path: Path, num_bytes: int) -> Iterator[None]:
    """Turn the many errors by which libraries report a full disk into one line.

    Args:
        path: A temporary file that the block writes; it is removed.
        num_bytes: What it needs at least.

    Raises:
        UserError: If the disk is full.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors raise the latter two
        free = shutil.disk_usage(path.parent).free
        if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT) and free >= num_bytes:
            raise
        path.unlink(missing_ok=True)
        raise UserError(
            f"{path}: the disk is full: {num_bytes} bytes are needed, {free} are free; "
            "the files from before are whole: make room and continue with --resume auto"
        ) from error


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt":  # Windows flushes neither folders nor what is open for reading only
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_mapping(path: Path, parse: Callable[[str], Any], where: str) -> dict[str, Any]:
    """Read a JSON or YAML file that holds a mapping.

    Args:
        path: The file.
        parse: ``json.loads`` or ``load_yaml``.
        where: Name of its folder in the error.

    Raises:
        UserError: If it cannot be read or parsed, or holds anything else.
    """
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{where}: {path.name}: {one_line(error)}{did_you_mean_file(path.parent)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: {path.name}: wanted a mapping, got {type(value).__name__}")
    return value


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a whole UTF-8 text file, or leave the old one."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


MAX_YAML_ITEMS = 100_000  # a run's args.yaml has about 150

# What published training states hold beside tensors; the dict of the package yacs is read as one, without the package.
_HARMLESS: list[Any] = [Namespace, (OrderedDict, "yacs.config.CfgNode")]

# What torch's restricted unpickler raises for files that are no checkpoints, found by feeding it damaged ones.
UNREADABLE = (
    OSError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError,
    ArithmeticError, struct.error, UnpicklingError,
)  # fmt: skip


def load_untrusted(path: str | os.PathLike) -> dict[str, Any]:
    """Read a file of ``torch.save`` without running any code it may hold.

    An ``argparse.Namespace`` or a configuration of yacs may be inside.

    Args:
        path: The file.

    Returns:
        What it holds, tensors on the CPU.

    Raises:
        UserError: If the file is missing, damaged (see ``check_seal``), no torch file, or holds anything but a dict;
            one line names it.
    """
    try:
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error says it all
            check_seal(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except UNREADABLE as error:
        # torch wraps what it found in the advice to load the file unrestricted
        inner = error.__context__ if isinstance(error, UnpicklingError) else None
        what = f"{path} is not a readable torch file: {one_line(inner or error)}"
        raise UserError(f"{what}{did_you_mean_file(path)}") from error
    _refuse_unbacked(content, path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, wanted a dict of weights or of a training state")
    return content


def load_yaml(text: str) -> Any:
    """Read YAML whose aliases do not make much of little: ten lines can stand for a list of billions.

    Raises:
        yaml.YAMLError: If the text is no YAML, or stands for more than ``MAX_YAML_ITEMS``.
    """
    try:
        content = yaml.safe_load(text)
    except (AttributeError, LookupError, ValueError, RecursionError) as error:
        # a date such as 2026-13-01 or !!timestamp x; !!bool x and !!int ''; thousands of brackets
        raise yaml.YAMLError(one_line(error)) from error
    count, stack = 0, [content]
    while stack:
        value = stack.pop()
        count += 1
        if count > MAX_YAML_ITEMS:
            raise yaml.YAMLError(f"it stands for more than {MAX_YAML_ITEMS:,} values, by aliases or otherwise")
        if isinstance(value, dict | list | tuple | set):
            stack.extend(value.values() if isinstance(value, dict) else value)
    return content


def _refuse_unbacked(content: Any, path: str | os.PathLike) -> None:
    """Refuse a tensor that claims more numbers than its file holds, which the first operation on it would allocate."""
    stack, seen = [content], set()  # containers may hold each other
    while stack:
        value = stack.pop()
        if isinstance(value, Namespace):
            value = vars(value)
        if isinstance(value, dict | list | tuple | set):
            if id(value) in seen:
                continue
            seen.add(id(value))
            stack.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, torch.Tensor):
            is_dense = value.layout is torch.strided and value.device.type == "cpu"
            if value._backward_hooks:  # of any type in a foreign pickle; copying the tensor would iterate over it
                raise UserError(f"{path} holds a tensor with hooks, wanted one without")
            if not is_dense or value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise UserError(
                    f"{path} holds a tensor of shape {tuple(value.shape)} without a value for each number in it"
                )


def load_weights(path: str | os.PathLike) -> dict[str, Any]:
    """Read what :func:`check_weights_file` takes, tensors on the CPU.

    Raises:
        UserError: As there.
    """
    if Path(path).suffix != ".safetensors":
        return load_untrusted(path)
    check_weights_file(path)
    return load(Path(path).read_bytes())


def weights_shapes(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a safetensors file that :func:`check_weights_file` has taken, from its header alone."""
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  no mapping


def check_weights_file(path: str | os.PathLike) -> None:
    """Refuse a file of weights that cannot be read.

    Raises:
        UserError: If it is missing or damaged, neither safetensors nor what :func:`load_untrusted` reads.
    """
    if Path(path).suffix != ".safetensors":
        load_untrusted(path)
        return
    try:
        check_seal(path)
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (OSError, SafetensorError) as error:
        what = f"{path} is not a readable safetensors file: {one_line(error)}"
        raise UserError(f"{what}{did_you_mean_file(path)}") from error
