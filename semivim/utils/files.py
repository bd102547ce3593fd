"""Files a run may not lose: written beside their place, flushed, then renamed over it."""

import os
import struct
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path whose file replaces ``path`` when the block ends, or vanishes if the block raises.

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


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt":  # Windows flushes neither folders nor what is open for reading only
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a whole UTF-8 text file, or leave the old one."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# What torch's restricted unpickler raises for files that are no checkpoints, found by feeding it damaged ones.
UNREADABLE = (
    OSError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError,
    ArithmeticError, struct.error, UnpicklingError,
)  # fmt: skip


def one_line(error: BaseException) -> str:
    """What an exception says, with its type where that is no sentence, in one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return (text if " " in text else f"{type(error).__name__} {text}".strip())[:300]


def load_untrusted(path: str | os.PathLike) -> dict[str, Any]:
    """Read a file of ``torch.save`` without running any code it may hold; an ``argparse.Namespace`` may be inside.

    Args:
        path: The file.

    Returns:
        What it holds, tensors on the CPU.

    Raises:
        ValueError: If the file is missing, damaged, no torch file, or holds anything but a dict; one line names it.
    """
    try:
        with torch.serialization.safe_globals([Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error says it all
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        # torch wraps what it found in the advice to load the file unrestricted
        inner = error.__context__ if isinstance(error, UnpicklingError) else None
        raise ValueError(f"{path} is not a readable torch file: {one_line(inner or error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, wanted a dict of weights or of a training state")
    return content
