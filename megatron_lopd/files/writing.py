"""Writing files: each is wholly there or not there at all, in the place of its name and nowhere else.

What lies at a name already is replaced, never written through: a link that somebody left there would lead to
a file of theirs. Modes are what the umask gives.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from megatron_lopd.errors import DataError, LopdError
from megatron_lopd.files.exclusive import take_name
from megatron_lopd.files.reading import naming, open_file, reading, require_regular

TEMPORARY_PREFIX = ".tmp-"
# What a file system says that does not flush directories; EACCES: of one that cannot be listed.
_NOT_FLUSHED = {errno.EINVAL, errno.EACCES, errno.EPERM, errno.EBADF, errno.EOPNOTSUPP, errno.ENOSYS}


def remove(path: Path) -> None:
    """Remove what has this name, if anything has: a file, a directory and all in it, or a link alone.

    What goes by itself meanwhile is no error. DataError, naming `path`, where it cannot be removed.
    """
    with errors_of_file(path, done="removed"), suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def fsync_directory(path: Path) -> None:
    """Make renames inside `path` survive a power cut.

    Where the file system flushes no directory by itself, all there is to be flushed on this machine is.
    Raises OSError that names it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            with naming(path):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NOT_FLUSHED:
            raise
        os.sync()


def fsync_file(path: Path) -> None:
    """Flush a file that another library wrote. Raises as `open_file`."""
    with open_file(path, follow_links=False) as stream, reading(path):
        os.fsync(stream.fileno())


def fsync_tree(directory: Path) -> None:
    """Flush every file below `directory`, and the directories themselves."""
    for root, _, names in os.walk(directory):
        for name in names:
            fsync_file(Path(root, name))
        fsync_directory(Path(root))


@contextmanager
def atomic_file(path: Path, mode: str = "wb", permissions: int = 0o666) -> Iterator[IO[Any]]:
    """Write `path` under a temporary name; flush, fsync and rename only if the block succeeds.

    `permissions`, less the umask, are the file's. The block does nothing but write: an OSError in it is the
    file's. Raises DataError when the disk is full, leaving nothing behind under either name.
    """
    with errors_of_file(path), temporary_file(path, mode, permissions) as stream:
        yield stream


@contextmanager
def errors_of_file(
    path: Path, error: type[LopdError] = DataError, *, done: str = "written"
) -> Iterator[None]:
    """Raise an OSError of the block, in which `path` is `done`, as an `error` that says what to do."""
    try:
        yield
    except OSError as failure:
        if failure.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "free some space or choose another run_dir"
        elif failure.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = "make it writable or choose another run_dir"
        else:
            advice = "check the disk or the mount it is on, or choose another run_dir"
        raise error(f"{path}: cannot be {done}: {failure.strerror or failure}: {advice}") from failure


@contextmanager
def temporary_file(path: Path, mode: str = "wb", permissions: int = 0o666) -> Iterator[IO[Any]]:
    """As `atomic_file`, with every error as it comes: for a block that does more than write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)

    def create(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_EXCL | os.O_NOFOLLOW, permissions)

    try:
        # A text may hold a file's name, which need not be UTF-8: it is written as the bytes that it is.
        encoding, errors = (None, None) if "b" in mode else ("utf-8", "surrogateescape")
        with open(temporary, mode, encoding=encoding, errors=errors, opener=create) as stream:
            yield stream
            with naming(path):
                stream.flush()
                os.fsync(stream.fileno())
                written = os.fstat(stream.fileno())
        _replace(temporary, path, written)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def _replace(temporary: Path, path: Path, written: os.stat_result) -> None:
    try:
        os.replace(temporary, path)
    except FileNotFoundError:  # of a request that was sent twice, over NFS, the second answer came
        if not (path.exists() and os.path.samestat(path.stat(), written)):
            raise


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other writer has: two may have the same pid, on two machines."""
    return path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}-{path.name}")


def publish(private: Path, path: Path) -> bool:
    """Give a whole file its final name unless that is taken; the private name goes. Whether it got it.

    Not where the private file is gone: whoever took the work over has committed, and cleared up. Raises as
    `take_name`.
    """
    try:
        if not take_name(private, path):
            return False
    except FileNotFoundError:
        return False
    finally:
        private.unlink(missing_ok=True)
    fsync_directory(path.parent)
    return True


def atomic_write_text(path: Path, text: str, permissions: int = 0o666) -> None:
    """Commit `text` in UTF-8. Raises as `atomic_file`."""
    with atomic_file(path, "w", permissions) as stream:
        stream.write(text)


def atomic_write_json(path: Path, value: Any) -> None:
    """Commit `value` as readable JSON (sorted keys, two-space indent)."""
    with atomic_file(path, "w") as stream:
        json.dump(value, stream, indent=2, sort_keys=True, allow_nan=False)
        stream.write("\n")


def copy_file(source: Path, target: Path) -> None:
    """Copy a regular file's bytes, whichever links lead to it. Raises as `open_file` and `atomic_file`."""
    with open_file(source) as stream, atomic_file(target) as copy:
        while True:
            with reading(source):
                chunk = stream.read(1 << 22)
            if not chunk:
                return
            copy.write(chunk)


def open_to_append(path: Path, error: type[LopdError] = DataError) -> IO[str]:
    """A text file to add lines to, made if need be. Raises `error` for what is no file, or not writable."""

    def create(name: str, flags: int) -> int:
        descriptor = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        require_regular(path, os.fstat(descriptor).st_mode, error)
        return descriptor

    with errors_of_file(path, error):
        if path.is_symlink():
            raise error(f"{path}: a link, not a file: remove it")
        return open(path, "a", encoding="utf-8", opener=create)


def settle_mode(path: Path) -> None:
    """Give a file that a library made for its owner alone the mode that the umask gives a new one."""
    probe = temporary_name(path)
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        os.chmod(path, stat.S_IMODE(os.fstat(descriptor).st_mode))
    finally:
        os.close(descriptor)
        probe.unlink()
