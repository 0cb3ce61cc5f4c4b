"""Digests that need not be taken twice: hints, in a directory of the user's, and never evidence.

A hint is of files that are, by device, inode, size and times, what they were when they were hashed. Where
work begins, files are hashed whatever a hint says, once a session: by the command and the processes that it
starts. Where nothing is begun (`relying_on_hints`: a committed stage looked at again, --dry-run, doctor,
status), a hint spares that. Nothing beside the files themselves is read, for whoever made them made that too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_lopd.artifacts.stamps import settled_at, stamp_of
from megatron_lopd.artifacts.user_cache import keep_hints, read_hints
from megatron_lopd.errors import DataError
from megatron_lopd.files.reading import reading

SESSION_VARIABLE = "LOPD_SESSION"  # in the environment of a command's processes: who hashed what for it
KIND = "digests"
_ADVICE = "leave it alone, and start again"
_relying: ContextVar[bool] = ContextVar("relying", default=False)
_kept_here: dict[tuple[str, str], _Entry] = {}  # by this process, wherever it may write
_taken: dict[tuple[str, str], _Taken] = {}  # by part and first file: what this process goes by


@dataclass(frozen=True)
class _Entry:
    """`files`: [path, *stamp] of each."""

    files: list[list[Any]]
    digest: str
    session: str


@dataclass(frozen=True)
class _Taken:
    """A digest of files, by path their stamps when it was taken, and how it is taken again."""

    stamps: dict[str, list[int]]
    digest: str
    again: Callable[[], str]


def stamp(path: Path) -> list[int]:
    """A file's `Stamp`, as a list for JSON. Raises DataError where it cannot be looked at."""
    with reading(path):
        return list(stamp_of(path.stat()))


@contextmanager
def relying_on_hints() -> Iterator[None]:
    """Within it a file whose stamp is that of a hint is not hashed again: for looking, not for beginning."""
    token = _relying.set(True)
    try:
        yield
    finally:
        _relying.reset(token)


def digest_of(part: str, files: Sequence[Path], make: Callable[[], str]) -> str:
    """The digest `make()` takes of `files`, all of one directory. `part`: what of it, and how it is taken.

    Raises DataError when a file is written meanwhile.
    """
    before = stamps_of(files)
    digest = _digest_of(part, files, before, make)
    if before:
        _taken[part, before[0][0]] = _Taken({path: times for path, *times in before}, digest, make)
    return digest


def _digest_of(part: str, files: Sequence[Path], before: list[list[Any]], make: Callable[[], str]) -> str:
    hint = _find(part, files, before)
    if hint is not None and (_relying.get() or hint.session == session()):
        return hint.digest
    started, digest = time.time_ns(), make()
    for path, *was in before:
        if stamp(Path(path)) != was:
            raise DataError(f"{path}: changed while it was hashed: {_ADVICE}")
    # Else it could have changed again after that, and bear this stamp.
    if all(settled_at(times[-1]) < started for times in before):
        _keep(part, files, _Entry(before, digest, session()))
    return digest


def is_kept(part: str, files: Sequence[Path]) -> bool:
    """Whether `digest_of` would take nothing anew within `relying_on_hints`."""
    return _find(part, files, stamps_of(files)) is not None


def require_unchanged(stamps: Sequence[Sequence[Any]], done: str) -> None:
    """DataError, naming the file, unless each of `stamps`, as `stamps_of`, is the file's stamp still.

    Or else the time of change alone is another, and the content as this process hashed it.
    """
    for path, *was in stamps:
        now = stamp(Path(path))
        is_known = now[:-1] == was[:-1] and any(path in taken.stamps for taken in _taken.values())
        if now != was and not (is_known and _is_as_hashed(path, now)):
            raise DataError(f"{path}: changed while it was {done}: {_ADVICE}")


def require_as_hashed(files: Sequence[Path]) -> None:
    """DataError, naming the file, where one is not as it was when this process had its digest.

    What was read in between is then what was hashed: nothing else holds the two together.
    """
    for path, *now in stamps_of(files):
        if not _is_as_hashed(path, now):
            raise DataError(f"{path}: changed since it was hashed: {_ADVICE}")


def _is_as_hashed(path: str, now: list[int]) -> bool:
    """Whether a file with the stamp `now` has the content that this process has digests of.

    A link to it elsewhere, another owner or mode change the time of change alone. Then it is hashed again.
    """
    for key, taken in list(_taken.items()):
        was = taken.stamps.get(path, now)
        if was == now:
            continue
        files = [Path(each) for each in taken.stamps]
        before = stamps_of(files)
        if was[:-1] != now[:-1] or taken.again() != taken.digest or stamps_of(files) != before:
            return False
        _taken[key] = replace(taken, stamps={of: times for of, *times in before})
    return True


def stamps_of(files: Sequence[Path]) -> list[list[Any]]:
    """[path, *stamp] of each."""
    return [[str(path.absolute()), *stamp(path)] for path in files]


def session() -> str:
    """The command's that this process belongs to: of the first of its processes, while that lives.

    Which is the first to ask, so a command asks before it starts others. An environment outlives a command
    where a queue keeps it for a job.
    """
    name = os.environ.get(SESSION_VARIABLE, "")
    pid, _, started = name.partition(".")
    if not (pid.isdecimal() and started and started == _start_of(pid)):
        name = os.environ[SESSION_VARIABLE] = f"{os.getpid()}.{_start_of(str(os.getpid()))}"
    return name


def _start_of(pid: str) -> str:
    """What no other process on this machine has with the same number: when it began, and since which boot."""
    try:
        # The name, cut after 15 bytes, is in no encoding.
        after_name = Path("/proc", pid, "stat").read_text(errors="replace").rpartition(")")[2]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""  # it is gone
    return f"{after_name.split()[19]}.{boot}"


def _about(files: Sequence[Path]) -> str:
    """All that is in a directory. Of another machine's files nothing is known here."""
    return f"{os.uname().nodename}:{files[0].parent.absolute()}"


def _find(part: str, files: Sequence[Path], stamps: list[list[Any]]) -> _Entry | None:
    if not files:
        return None
    entry = _kept_here.get((part, stamps[0][0]))
    if entry is None or entry.files != stamps:
        entry = _entry(read_hints(KIND, _about(files)).get(part))
    return entry if entry is not None and entry.files == stamps else None


def _entry(raw: Any) -> _Entry | None:
    try:
        entry = _Entry(**raw)
    except TypeError:
        return None
    return entry if isinstance(entry.digest, str) and isinstance(entry.files, list) else None


def _keep(part: str, files: Sequence[Path], entry: _Entry) -> None:
    """For this process; and for others where the user's directory can be written, which it need not be."""
    if not files:
        return
    _kept_here[part, entry.files[0][0]] = entry
    about = _about(files)
    keep_hints(KIND, about, read_hints(KIND, about) | {part: vars(entry)})
