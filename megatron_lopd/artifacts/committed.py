"""The files of an artifact, read as what its manifest says of them or not at all.

A file is opened below its artifact's directory, no link followed, and hashed before anything of it is used. A
process remembers the stamp that a file had when it hashed it, and is told those of the process that started
it: a file with that stamp need not be hashed again, one with another is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from blake3 import blake3

from megatron_lopd.artifacts.stamps import Stamp, settled_at, stamp_of
from megatron_lopd.errors import DataError
from megatron_lopd.files.digests import HASHING_THREADS
from megatron_lopd.files.reading import parse_json, reading, require_regular

ANY_DEVICE = -1  # in a stamp from another machine, where a shared file system has another number

_CHUNK = 1 << 20  # read at a time, so that what is hashed is still in the processor's cache

T = TypeVar("T")
R = TypeVar("R")

# By absolute path: the stamp and the digest that this process, or the one that started it, found.
_hashed: dict[str, tuple[Stamp, str]] = {}


@dataclass(frozen=True)
class FileEntry:
    """A committed file: size in bytes and hex BLAKE3."""

    size: int
    blake3: str


@dataclass(frozen=True)
class CommittedFile:
    """A file of the artifact in a directory, `name` relative to that, and what its manifest says of it."""

    artifact: Path
    name: str
    entry: FileEntry

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.artifact / self.name

    def open(self) -> BinaryIO:
        """The file, once it is known to be as it was committed.

        DataError when it is missing, no regular file, reached by a link, or not what the manifest says.
        """
        with ExitStack() as unless_checked:
            stream = unless_checked.enter_context(_open_below(self.artifact, self.name))
            self._check(stream)
            unless_checked.pop_all()
        return BufferedReader(stream)

    def read_json(self) -> Any:
        """The value of a JSON file. Raises as `open` and `parse_json` do."""
        with self.open() as stream, reading(self.path):
            data = stream.read()
        return parse_json(data.decode(errors="replace"), str(self.path))

    def check(self) -> None:
        """Raise as `open` does."""
        self.open().close()

    def check_size(self) -> None:
        """Raise DataError when it is missing or not of the size it was committed with; not opened."""
        with reading(self.path):
            try:
                found = os.lstat(self.path)
            except FileNotFoundError:
                raise _missing(self.path, self.artifact) from None
        require_regular(self.path, found.st_mode)
        self._require_size(found.st_size)

    def has_stamp(self, kept: Mapping[str, tuple[Stamp, str]]) -> bool:
        """Whether it is as it was when its digest, by `kept`, was taken and was the right one."""
        with _open_below(self.artifact, self.name) as stream:
            self._require_size(os.fstat(stream.fileno()).st_size)
            return _is_known(kept, self.key, _stamp_of(stream), self.entry.blake3)

    @property
    def key(self) -> str:
        """What it is remembered by."""
        return os.path.abspath(self.path)

    def _check(self, stream: FileIO) -> None:
        found = _stamp_of(stream)
        self._require_size(found[2])
        if not _is_known(_hashed, self.key, found, self.entry.blake3):
            self._require_digest(_hash(stream, self.path))
            stream.seek(0)

    def _require_size(self, size: int) -> None:
        if size != self.entry.size:
            raise DataError(
                f"{self.path}: damaged: {size} bytes, the manifest says {self.entry.size}: "
                f"restore it or remove {self.artifact} to make it again"
            )

    def _require_digest(self, digest: str) -> None:
        if digest != self.entry.blake3:
            raise DataError(
                f"{self.path}: damaged: BLAKE3 {digest[:12]}, the manifest says {self.entry.blake3[:12]}: "
                f"restore it or remove {self.artifact} to make it again"
            )


def seal(directory: Path, names: Sequence[str]) -> dict[str, FileEntry]:
    """Flush and hash files below `directory`: what its manifest will say of them, by name.

    DataError naming one that is missing, no regular file, or reached by a link.
    """

    def sealed(name: str) -> FileEntry:
        with _open_below(directory, name) as stream:
            with reading(directory / name):
                os.fsync(stream.fileno())
            digest = _hash(stream, directory / name)
            return FileEntry(os.fstat(stream.fileno()).st_size, digest)

    return dict(zip(names, _by_threads(sealed, names), strict=True))


def verify(files: Sequence[CommittedFile]) -> None:
    """Hash what this process does not know to be as committed. DataError naming the first that is not."""
    for file in files:
        file.check_size()
    _by_threads(CommittedFile.check, files)


def share_of(files: Iterable[CommittedFile], rank: int, size: int) -> list[CommittedFile]:
    """What `rank` of `size` takes of them: as many bytes as the others, as near as whole files allow."""
    shares: list[list[CommittedFile]] = [[] for _ in range(size)]
    held = [0] * size
    for file in sorted(files, key=lambda each: (-each.entry.size, str(each.path))):
        least = held.index(min(held))
        shares[least].append(file)
        held[least] += file.entry.size
    return shares[rank]


def known_of(files: Iterable[CommittedFile]) -> dict[str, tuple[Stamp, str]]:
    """What this process knows of those of `files` that it has hashed, for `learn` in another one."""
    return {file.key: _hashed[file.key] for file in files if file.key in _hashed}


def learn(known: Mapping[str, tuple[Stamp, str]], *, elsewhere: bool = False) -> None:
    """Take over what another process of this job has hashed; `elsewhere`, on another machine."""
    for key, (stamp, digest) in known.items():
        _hashed[key] = (ANY_DEVICE, *stamp[1:]) if elsewhere else stamp, digest


def _is_known(known: Mapping[str, tuple[Stamp, str]], key: str, found: Stamp, digest: str) -> bool:
    stamp, hashed = known.get(key, (None, ""))
    return stamp in (found, (ANY_DEVICE, *found[1:])) and hashed == digest


def _open_below(directory: Path, name: str) -> FileIO:
    """A regular file of an artifact. No part of `name` may be a link; what leads to `directory` may."""
    path, (*folders, last) = directory / name, name.split("/")
    places: list[str | Path] = [directory, *folders]
    with ExitStack() as opened, reading(path):
        place: int | None = None
        try:
            for folder in places:
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
                place = os.open(folder, flags | (0 if place is None else os.O_NOFOLLOW), dir_fd=place)
                opened.callback(os.close, place)
            # Looked at before it is opened, for opening a device may do something, and after.
            require_regular(path, os.stat(last, dir_fd=place, follow_symlinks=False).st_mode)
            descriptor = os.open(
                last, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW, dir_fd=place
            )
        except FileNotFoundError:
            raise _missing(path, directory) from None
        except NotADirectoryError:
            raise DataError(
                f"{path}: a link or a file is where a folder of {directory} was: restore that, or remove "
                f"{directory} to make it again"
            ) from None
        stream = FileIO(descriptor)
        try:
            require_regular(path, os.fstat(descriptor).st_mode)
        except DataError:
            stream.close()
            raise
    return stream


def _missing(path: Path, artifact: Path) -> DataError:
    return DataError(
        f"{path}: missing: the manifest lists it: restore it or remove {artifact} to make it again"
    )


def _stamp_of(stream: FileIO) -> Stamp:
    return stamp_of(os.fstat(stream.fileno()))


def _hash(stream: FileIO, path: Path) -> str:
    """Hex BLAKE3 of the whole open file, remembered unless its time is in the future, by this clock."""
    before = _stamp_of(stream)
    waiting = settled_at(before[-1]) - time.time_ns()
    if 0 <= waiting <= settled_at(before[-1]) - before[-1]:  # then a write from now on has another time
        time.sleep(waiting / 1e9)
        waiting = -1
    digest, buffer = blake3(), memoryview(bytearray(min(_CHUNK, before[2] + 1)))
    with reading(path):
        stream.seek(0)
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    after = _stamp_of(stream)
    if after != before:
        if after[:-1] == before[:-1]:  # a link to it, or another mode
            return _hash(stream, path)
        raise DataError(f"{path}: it was written to while it was read: end who writes to it, and run again")
    if waiting < 0:
        _hashed[os.path.abspath(path)] = before, digest.hexdigest()
    return digest.hexdigest()


def _by_threads(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`work` of each, in order. What one raises is raised, and those not begun are left out."""
    pool = ThreadPoolExecutor(min(HASHING_THREADS, os.cpu_count() or 1), thread_name_prefix="hashing")
    try:
        return list(pool.map(work, items))
    finally:
        pool.shutdown(cancel_futures=True)
