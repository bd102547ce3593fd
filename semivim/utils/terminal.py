"""Text of others on the terminal: names of labels and files, and messages of libraries."""

import io
import logging
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_OBEYED = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}  # controls, marks of direction, lone surrogates, line breaks


def escape(text: str) -> str:
    r"""Write characters that a terminal obeys, hides or cannot encode as Python writes them, e.g. ``\x1b``."""
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in _OBEYED else c for c in text)


def escape_what_the_output_cannot_encode() -> None:
    r"""Let the standard output write such characters as Python does, e.g. ``\xe9``, where it would raise instead.

    A redirected output takes its encoding from the locale, which may be ASCII or one of Windows' code pages.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def escape_lines(text: str) -> str:
    """Escape each line of a text that has several of its own."""
    return "\n".join(map(escape, text.split("\n")))


class _EscapedRecord(logging.LogRecord):
    def getMessage(self) -> str:  # noqa: N802  logging's name
        return escape(super().getMessage())


@contextmanager
def libraries_are_escaped() -> Iterator[None]:
    """Escape, inside the block, the log records and warnings of all libraries: they quote names of files and labels."""
    factory, formatter = logging.getLogRecordFactory(), warnings.formatwarning

    def escaped(message: Any, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
        return formatter(escape(str(message)), category, escape(filename), lineno, line)

    logging.setLogRecordFactory(_EscapedRecord)
    warnings.formatwarning = escaped
    try:
        yield
    finally:
        logging.setLogRecordFactory(factory)
        warnings.formatwarning = formatter
