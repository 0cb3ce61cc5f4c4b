"""Files that are either wholly there or not there at all, and their digests."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron_lopd.errors import DataError

TEMPORARY_PREFIX = ".tmp-"
_CHUNK = 1 << 22
# Files hashed at a time by a process: hashlib lets go of the interpreter. A disk array may feed as many.
HASHING_THREADS = 8


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, no NaN. What digests are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes. Raises OSError with its name, which that of a failed read has not."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    return digest.hexdigest()


def sha256_files(paths: Iterable[Path]) -> Iterator[str]:
    """`sha256_file` of each, in order, by several threads. Those not begun when it is left are not read."""
    pool = ThreadPoolExecutor(min(HASHING_THREADS, os.cpu_count() or 1), thread_name_prefix="sha256")
    try:
        yield from pool.map(sha256_file, paths)
    finally:
        pool.shutdown(cancel_futures=True)


def remove(path: Path) -> None:
    """Remove what has this name, if anything has: a file, a directory and all in it, or a link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fsync_directory(path: Path) -> None:
    """Make renames inside `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Flush a file that another library wrote."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def fsync_tree(directory: Path) -> None:
    """Flush every file below `directory`, and the directories themselves."""
    for root, _, names in os.walk(directory):
        for name in names:
            fsync_file(Path(root, name))
        fsync_directory(Path(root))


class HashedFile:
    """Writes through to a stream and takes the digest on the way: what was written need not be read again."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
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
    def sha256(self) -> str:
        """Hex SHA-256 of all that was written."""
        return self._digest.hexdigest()


@contextmanager
def atomic_file(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Write `path` under a temporary name; flush, fsync and rename only if the block succeeds.

    The block does nothing but write: an OSError in it is the file's. Raises DataError when the disk is full,
    leaving nothing behind under either name.
    """
    with errors_of_file(path), temporary_file(path, mode) as stream:
        yield stream


@contextmanager
def errors_of_file(path: Path) -> Iterator[None]:
    """Raise an OSError of the block, which writes `path`, as the DataError that says what to do."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written: {error.strerror or error}: free some space or choose another run_dir"
        ) from error


@contextmanager
def temporary_file(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """As `atomic_file`, with every error as it comes: for a block that does more than write."""
    # A name of its own: two writers of one file may have the same pid, on two machines.
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open(mode, encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def publish(private: Path, path: Path) -> bool:
    """Give a whole file its final name unless that is taken; the private name goes. Whether it got it.

    Not where the private file is gone: whoever took the work over has committed, and cleared up.
    """
    try:
        os.link(private, path)
    except (FileExistsError, FileNotFoundError):
        return False
    finally:
        private.unlink(missing_ok=True)
    fsync_directory(path.parent)
    return True


def atomic_write_json(path: Path, value: Any) -> None:
    """Commit `value` as readable JSON (sorted keys, two-space indent)."""
    with atomic_file(path, "w") as stream:
        json.dump(value, stream, indent=2, sort_keys=True, allow_nan=False)
        stream.write("\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file; DataError naming it when it is missing or torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, 100,000 brackets
        raise DataError(f"{path}: damaged: not valid JSON ({error})") from None
