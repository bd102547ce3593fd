"""A SHA-256 inside a file of weights, so that damage is found before the weights are used.

It lies in the file itself, so no kill can part it from what it is of: a checkpoint of ``torch.save``, which is a ZIP
archive, has it as the archive's comment, and a safetensors file among its metadata. Files of others, which have none,
are not checked.
"""

import hashlib
import json
import os
import struct
from pathlib import Path

from semivim.utils.user_error import UserError

_MARK = b"sha256:"
_SEAL_BYTES = len(_MARK) + 64
_ZIP_START, _ZIP_END, _ZIP_END_BYTES = b"PK\x03\x04", b"PK\x05\x06", 22
_METADATA_KEY = "semivim.sha256"  # not a key that others use for a digest of their own
_UNSET = "0" * 64


def seal_checkpoint(path: Path) -> None:
    """Put the SHA-256 of a file that ``torch.save`` has just written behind it, as the comment of the archive."""
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", _SEAL_BYTES))
    digest = _digest_of_first(path, path.stat().st_size)
    with path.open("ab") as file:
        file.write(_MARK + digest.encode())


def seal_safetensors(path: Path) -> None:
    """Write the SHA-256 of a safetensors file, taken with zeros in the digest's place, among its metadata."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = {_METADATA_KEY: _UNSET} | header.pop("__metadata__", {})
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])
    place = _digest_place(path)
    assert place is not None
    digest = _digest_around(path, place)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(digest.encode())


def check_seal(path: str | os.PathLike) -> None:
    """Hold a file against the SHA-256 inside it, if it has one.

    Raises:
        UserError: If they differ, or the end of a checkpoint is missing; one line names the file.
        OSError: If the file cannot be read.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        place = _digest_place(path)
        if place is not None:
            with path.open("rb") as file:
                file.seek(place)
                wanted = file.read(64)
            _compare(path, _digest_around(path, place), wanted)
        return
    with path.open("rb") as file:
        start = file.read(len(_ZIP_START))
        size = file.seek(0, os.SEEK_END)
        file.seek(-min(size, _SEAL_BYTES), os.SEEK_END)
        end = file.read()
    if end.startswith(_MARK) and len(end) == _SEAL_BYTES:
        _compare(path, _digest_of_first(path, size - _SEAL_BYTES), end[len(_MARK) :])
    elif start == _ZIP_START and not (end[-_ZIP_END_BYTES:].startswith(_ZIP_END) and end.endswith(b"\0\0")):
        raise UserError(f"{path} is not a readable torch file: its end is missing or damaged")


def _compare(path: Path, found: str, wanted: bytes) -> None:
    if found.encode() != wanted:
        raise UserError(
            f"{path} is damaged: its SHA-256 is {found}, wanted {wanted.decode('ascii', 'backslashreplace')}"
        )


def _digest_of_first(path: Path, num_bytes: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while num_bytes and (block := file.read(min(num_bytes, 1 << 20))):
            digest.update(block)
            num_bytes -= len(block)
    return digest.hexdigest()


def _digest_place(path: Path) -> int | None:
    """Where the digest stands in a safetensors file, None where it has none."""
    with path.open("rb") as file:
        size = path.stat().st_size
        header_bytes = int.from_bytes(file.read(8), "little")
        header = file.read(min(header_bytes, size))  # a damaged length must not take memory
    key = f'"{_METADATA_KEY}":"'.encode()
    place = header.find(key)
    return None if place < 0 else 8 + place + len(key)


def _digest_around(path: Path, place: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(place))
        file.seek(64, os.SEEK_CUR)
        digest.update(_UNSET.encode())
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
