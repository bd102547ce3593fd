"""Mistakes that a user can mend: one line and exit status 2, where any other exception keeps its traceback."""

import difflib
import errno
import os
import re
import reprlib
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from semivim.utils.process_faults import process_fault
from semivim.utils.terminal import (
    escape,
    escape_lines,
    escape_what_the_output_cannot_encode,
    libraries_are_escaped,
)


class UserError(ValueError):
    """A flag, a file or a folder is not what it must be; the message names it, what it is and what is wanted.

    Raised where a user's input is read, and nowhere else.
    """


@contextmanager
def user_errors_end_the_program(prog: str, debug: bool = False) -> Iterator[None]:
    """End the process with one line and status 2 where the block raises a :class:`UserError` or fills the disk.

    The same for the end of another process of the run (see ``process_fault``), with status 1.

    What libraries log or warn of inside the block is escaped.

    Args:
        prog: Name of the program, which the line starts with.
        debug: Print the traceback before the line.
    """
    escape_what_the_output_cannot_encode()
    try:
        with libraries_are_escaped():
            yield
    except (OSError, RuntimeError, UserError) as error:
        known, status = _in_one_line(error)
        if known is None:
            raise
        if debug:
            sys.stderr.write(escape_lines(traceback.format_exc()))
        fail(prog, known, status)


def _in_one_line(error: OSError | RuntimeError | UserError) -> tuple[UserError | None, int]:
    """The error of a line that ends the program, None for a bug, and the exit status."""
    if isinstance(error, UserError):
        return error, 2
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{error.filename or 'the output'}: the disk is full"), 2
    fault = process_fault(error)
    return (UserError(fault), 1) if fault else (None, 1)


def fail(prog: str, error: UserError, status: int = 2) -> NoReturn:
    """Print the line of a user's mistake and exit, with status 2 by default."""
    sys.stderr.write(f"{prog}: error: {escape(user_line(error))}\n")
    sys.exit(status)


def user_line(error: UserError) -> str:
    """The message of an error, of which torch makes the end of a traceback where a loader process raised it."""
    last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return re.sub(rf"^(\w+\.)*{type(error).__name__}: ", "", last)


def one_line(error: BaseException) -> str:
    """What an exception says, with its type where that is no sentence, in one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return (text if " " in text else f"{type(error).__name__} {text}".strip())[:300]


def short(value: Any) -> str:
    """A value as an error shows it, in at most 60 characters."""
    # aliases in YAML can make a list of billions in a few lines
    bounded = reprlib.Repr()
    bounded.maxlevel, bounded.maxstring, bounded.maxother = 3, 60, 60
    text = " ".join(bounded.repr(value).splitlines())  # a tensor has several
    return text if len(text) <= 60 else f"{text[:57]}..."


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """The name nearest to a word, as the end of an error; '' where none is near."""
    near = difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def did_you_mean_file(path: str | os.PathLike) -> str:
    """The file nearest to the name of one that is missing, as the end of an error; '' for a file that is there."""
    folder, name = os.path.split(os.path.normpath(path))
    if os.path.exists(path) or not os.path.isdir(folder or "."):
        return ""
    near = difflib.get_close_matches(name, os.listdir(folder or "."), n=1)
    return f"; did you mean {os.path.join(folder, near[0])}?" if near else ""
