"""Text of others in a Markdown page: names of classes, licences, values of flags. It is shown, and does nothing."""

import re
from collections.abc import Sequence
from typing import Any

from semivim.utils.terminal import escape

# What Markdown, HTML, tables or formulas obey inside a line.
_ACTIVE = re.compile(r"[\\`*_{}\[\]<>#!|~&:@^$]")
_WWW = re.compile(r"(www)(\.)", re.IGNORECASE)
_BREAK = "<!-- -->"  # shown as nothing; pages link what looks like an address, also where it is written in entities


def plain(value: Any) -> str:
    """A value in one line, without characters that a reader cannot see."""
    return escape(" ".join(str(value).split()))


def inert(value: Any) -> str:
    """A value as text inside a line of Markdown, where it is no link, picture, HTML, formula or end of a cell."""
    text = _ACTIVE.sub(lambda found: f"&#{ord(found[0])};", plain(value))
    for address in ("&#58;", "&#64;"):  # : and @
        text = text.replace(address, f"{address}{_BREAK}")
    return _WWW.sub(rf"\1{_BREAK}\2", text)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of values, which are made inert."""
    lines = [map(inert, head), ["---"] * len(head), *(map(inert, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bullets(items: dict[str, Any]) -> str:
    """A list of values with names of our own; the values are made inert."""
    return "\n".join(f"- {key.replace('_', ' ')}: {inert(value)}" for key, value in items.items())
