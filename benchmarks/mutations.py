"""Damage to files: to their bytes, to their lines, and to the values that they hold, all drawn from one generator."""

import copy
import math
from argparse import Namespace
from collections.abc import Iterator, MutableMapping, MutableSequence, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor

# Values that are valid somewhere, but hardly where they are put.
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 0.5, 1e-320, 2**31, 2**63, 10**400, 1e308, math.inf, -math.inf, math.nan,
    "", " ", "x", "0", "-1", "1e5", "nan", "../canary", "/etc/passwd", "a\0b", "a\nb", "\x1b[2J", "\u202e",
    "\u00e9" * 400,
    "9" * 5000, [], {}, [[]], [None], [0] * 50, ["x", 1], [1, [2, [3]]], {"": 0}, {"x": {"y": {}}},
]  # fmt: skip
ODD_TENSORS = [
    torch.zeros(()),
    torch.zeros(0),
    torch.zeros(3, 2),
    torch.full((5,), math.nan),
    torch.zeros(4, dtype=torch.int64),
    torch.zeros(2, 2, dtype=torch.complex64),
    torch.zeros(4, dtype=torch.bool),
]


def damaged(data: bytes, rng: Random, tokens: Sequence[bytes] = ()) -> bytes:
    """Damage bytes at one to four places: cut, flip, overwrite, remove, repeat, move, or insert one of the tokens."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((1, 2, 4, 8, 64, 1024)))
        part, other = data[start:end], rng.randrange(len(data) + 1)
        kind = rng.randrange(8 if tokens else 7)
        if kind == 0:
            data = data[:start]
        elif kind == 1:
            flipped = bytes([part[0] ^ 1 << rng.randrange(8)]) if part else b""
            data = data[:start] + flipped + data[start + 1 :]
        elif kind == 2:
            data = data[:start] + rng.randbytes(len(part)) + data[end:]
        elif kind == 3:
            data = data[:start] + rng.choice((b"\0", b"\xff", b"\x80", b"\x7f")) * len(part) + data[end:]
        elif kind == 4:
            data = data[:start] + data[end:]
        elif kind == 5:
            data = data[:start] + part * rng.choice((2, 3, 50)) + data[end:]
        elif kind == 6:
            data = data[:other] + part + data[other:]
        else:
            data = data[:start] + rng.choice(tokens) + data[start:]
    return data


def damaged_lines(text: str, rng: Random, tokens: Sequence[str], separators: str = " ,") -> str:
    """Damage one to four lines of a text: drop, repeat, move or join them, or put a token in the place of a field."""
    lines = text.split("\n")
    for _ in range(rng.choice((1, 1, 2, 4))):
        place, other = rng.randrange(len(lines)), rng.randrange(len(lines))
        kind = rng.randrange(7)
        if kind == 0 and len(lines) > 1:
            del lines[place]
        elif kind == 1:
            lines.insert(other, lines[place])
        elif kind == 2:
            lines[place], lines[other] = lines[other], lines[place]
        elif kind == 3:
            lines.insert(place, rng.choice(tokens))
        elif kind == 4:
            lines[place] += rng.choice(separators) + lines[other]
        else:
            separator = rng.choice(separators)
            fields = lines[place].split(separator)
            fields[rng.randrange(len(fields))] = rng.choice(tokens)
            lines[place] = separator.join(fields)
    return "\n".join(lines)


def changed(content: Any, rng: Random, odd: Sequence[Any] = ODD, keys: Sequence[str] = ("x",)) -> Any:
    """Change one to three entries of nested lists and mappings.

    Args:
        content: Is copied; its tuples become lists.
        rng: Where everything is drawn.
        odd: Values to put in the place of others.
        keys: Keys to add or to rename others to.
    """
    content = _as_lists(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(content))
        if not places or rng.random() < 0.01:
            return copy.deepcopy(rng.choice(odd))
        container, key = rng.choice(places)
        kind = rng.randrange(7)
        if kind < 2:
            container[key] = copy.deepcopy(rng.choice(odd))
        elif kind == 2:
            container[key] = _like(container[key], rng)
        elif kind == 3:
            del container[key]
        elif kind == 4:
            other, other_key = rng.choice(places)
            container[key], other[other_key] = copy.deepcopy((other[other_key], container[key]))
        elif kind == 5:
            container[key] = rng.choice(([container[key]], {"x": container[key]}))
        elif isinstance(container, MutableMapping):
            value = container.pop(key) if rng.random() < 0.5 else copy.deepcopy(rng.choice(odd))
            container[rng.choice(keys)] = value
        else:
            container.insert(key, copy.deepcopy(rng.choice(odd)))
    return content


def _as_lists(value: Any) -> Any:
    """A copy in which every container can be changed."""
    if isinstance(value, Namespace):
        return Namespace(**{key: _as_lists(part) for key, part in vars(value).items()})
    if isinstance(value, MutableMapping):
        return {key: _as_lists(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_as_lists(part) for part in value]
    return value.clone() if isinstance(value, Tensor) else value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Container and key of each entry, on every level."""
    container = vars(value) if isinstance(value, Namespace) else value
    if isinstance(container, MutableMapping):
        parts = container.items()
    elif isinstance(container, MutableSequence):
        parts = enumerate(container)
    else:
        return
    for key, part in parts:
        yield container, key
        yield from _places(part)


def _like(value: Any, rng: Random) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return rng.choice((-value, value + 1, value * 1000, value // 3, str(value)))
    if isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        return rng.choice((value[1:], value * 2, value.upper(), damaged(text, rng).decode("utf-8", "replace")))
    if isinstance(value, list):
        return rng.choice((value * 2, value[1:], value[::-1]))
    if isinstance(value, Tensor):
        return rng.choice(
            (value.flatten(), value[None], value.double(), value.to(torch.int32), value.mT, value[:0])
            if value.dim() > 1
            else (value[None], value.double(), value.new_zeros(7))
        )
    return [value]
