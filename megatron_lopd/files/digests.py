"""Digests of bytes, files and values."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import IO, Any

from blake3 import blake3

from megatron_lopd.files.reading import open_file, reading

_CHUNK = 1 << 22
# Files hashed at a time by a process: blake3 lets go of the interpreter. A disk array may feed as many.
HASHING_THREADS = 8


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, no NaN. What digests are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a regular file's bytes. Raises as `reading.open_file`."""
    digest = hashlib.sha256()
    with open_file(path, buffering=0) as stream, reading(path):
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


class HashedFile:
    """Writes through to a stream and takes the digest on the way: what was written need not be read again."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._digest = blake3()
        self.size = 0

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`; returns its bytes."""
        self._stream.write(data)
        self._digest.update(data)
        count = memoryview(data).nbytes
        self.size += count
        return count

    def flush(self) -> None:
        """Hand what is buffered to the operating system."""
        self._stream.flush()

    @property
    def blake3(self) -> str:
        """Hex BLAKE3 of all that was written."""
        return self._digest.hexdigest()
