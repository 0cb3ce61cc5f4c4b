"""Where the tensors of a safetensors file lie, from its header alone."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lopd.errors import DataError
from megatron_lopd.files.reading import open_file, parse_json, reading

MOST_HEADER_BYTES = 100_000_000  # as the safetensors library has it
_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class TensorLocation:
    """Where a tensor's bytes lie in a safetensors file: [start, end) in bytes from its beginning."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def tensor_locations(path: Path) -> Iterator[TensorLocation]:
    """The tensors of one safetensors file, in the order of their bytes. DataError when it is malformed.

    They cover the file from its header to its end, without a gap and without sharing a byte.
    """
    size, offset, header = _header(path)
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    found = []
    try:
        for name, entry in entries.items():
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = [*shape, start, end]
            if not all(type(number) is int and 0 <= number <= size for number in numbers):
                raise TypeError
            if math.prod(shape) * _BITS[dtype] != 8 * (end - start):
                raise ValueError
            found.append(TensorLocation(path, name, dtype, tuple(shape), offset + start, offset + end))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError(f"{path}: damaged: unreadable safetensors header: copy it again") from None
    found.sort(key=lambda location: (location.start, location.end))
    at = offset
    for location in found:
        if location.start != at:
            raise DataError(
                f"{path}: damaged: tensor {location.name} begins at byte {location.start}, not {at}"
            )
        at = location.end
    if at != size:
        raise DataError(f"{path}: damaged: its tensors end at byte {at} of {size}")
    yield from found


def _header(path: Path) -> tuple[int, int, dict[str, Any]]:
    """(the file's bytes, the first that is not its header's, the header)."""
    with open_file(path) as stream, reading(path):
        size = os.fstat(stream.fileno()).st_size
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if 8 + length > size or length > MOST_HEADER_BYTES:
            raise DataError(f"{path}: damaged: not a whole safetensors file ({size} bytes)")
        text = stream.read(length)
    try:
        header = parse_json(text.decode(), f"{path}'s header")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: damaged: unreadable safetensors header ({error})") from None
    except DataError as error:
        raise DataError(f"{path}: damaged: unreadable safetensors header: {error}") from None
    if not isinstance(header, dict):
        raise DataError(f"{path}: damaged: unreadable safetensors header: copy it again")
    return size, 8 + length, header
