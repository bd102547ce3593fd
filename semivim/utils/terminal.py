"""Text of others on the terminal: names of labels and files, and messages of libraries."""

import io
import sys
import unicodedata

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
