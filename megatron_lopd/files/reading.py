"""Reading files, whoever wrote them: regular ones, bounded, by strict rules, named in every error.

A path that a user or a file gives may lead to a FIFO, which blocks for ever, to a device without an end, or
to text that takes all memory once it is parsed. Whatever this package reads by itself goes through here.
"""

from __future__ import annotations

import codecs
import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from megatron_lopd.errors import DataError, LopdError, Unreadable

# Bytes. The largest tokenizer.json in use has some 35 MB; JSON takes about ten times its size in memory.
TEXT_LIMIT = 128 << 20
LINE_LIMIT = 32 << 20  # a sample of a million tokens has a tenth of it
DIGITS_LIMIT = 1000
STALE_TRIES = 5  # of a file that is being replaced, over NFS
DEPTH_LIMIT = 100  # brackets within brackets: this program's own functions walk such values by recursion

_PIECE = 1 << 20
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a link",
}


def open_file(
    path: Path, *, error: type[LopdError] = DataError, follow_links: bool = True, buffering: int = -1
) -> BinaryIO:
    """Open a regular file for its bytes, at once.

    Raises `error` where nothing is there, or what is there is no regular file (without `follow_links` also
    where it is a link); Unreadable, or `error` where that is not DataError, when the system refuses.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW)
    with reading(path, error):
        # Looked at before it is opened, for opening a device may do something, and after, for it may change.
        require_regular(path, os.stat(path, follow_symlinks=follow_links).st_mode, error)
        descriptor = os.open(path, flags)
        try:
            require_regular(path, os.fstat(descriptor).st_mode, error)
            return open(descriptor, "rb", buffering)
        except BaseException:
            os.close(descriptor)
            raise


def mode_of(path: Path, *, follow_links: bool = True) -> int | None:
    """What is at `path`, as `os.stat` has it; None for nothing. Unreadable where the system does not say.

    A disk that hiccups must not look like a file that is gone: what follows from that cannot be taken back.
    """
    with reading(path):
        try:
            return os.stat(path, follow_symlinks=follow_links).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None


def is_there(path: Path) -> bool:
    """Whether anything has this name, a link to nothing too. Unreadable as `mode_of`."""
    return mode_of(path, follow_links=False) is not None


def is_file(path: Path) -> bool:
    """Whether it leads to a regular file. Unreadable as `mode_of`."""
    return stat.S_ISREG(mode_of(path) or 0)


def is_directory(path: Path) -> bool:
    """Whether it leads to a directory. Unreadable as `mode_of`."""
    return stat.S_ISDIR(mode_of(path) or 0)


def names_in(directory: Path) -> list[str]:
    """The names in a directory, in order; none where it is not there. Unreadable as `mode_of`."""
    with reading(directory):
        try:
            return sorted(os.listdir(directory))
        except (FileNotFoundError, NotADirectoryError):
            return []


def require_regular(path: Path, mode: int, error: type[LopdError] = DataError) -> None:
    """Raise `error` unless `mode`, as `os.stat` gives it, is that of a regular file."""
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise error(f"{path}: {kind}, not a file: put the file itself there")


@contextmanager
def reading(path: Path, error: type[LopdError] = DataError) -> Iterator[None]:
    """Raise an OSError of the block, which reads `path`, as one line that names it: as `open_file`."""
    try:
        yield
    except FileNotFoundError:
        if path.is_symlink():
            raise error(f"{path}: a link to nothing: put the file itself there") from None
        raise error(f"{path}: no such file") from None
    except OSError as failure:
        if failure.errno == errno.ELOOP:
            raise error(f"{path}: a link, not a file: put the file itself there") from None
        advice = (
            "check its permissions"
            if failure.errno in (errno.EACCES, errno.EPERM)
            else "check the disk or the mount it is on, and run the same command again"
        )
        kind = Unreadable if error is DataError else error
        raise kind(f"{path}: cannot be read: {failure.strerror or failure}: {advice}") from failure


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` in an OSError of the block: a call on what is open, a write or a flush, names nothing."""
    try:
        yield
    except OSError as failure:
        failure.filename = failure.filename or str(path)
        raise


def read_bytes(
    path: Path, *, limit: int = TEXT_LIMIT, error: type[LopdError] = DataError, follow_links: bool = True
) -> bytes:
    """All bytes of a file of at most `limit`. Raises as `open_file`, and `error` where there are more.

    One that is replaced meanwhile, which over NFS takes away what is open, is read anew.
    """
    for tries_left in reversed(range(STALE_TRIES)):
        try:
            return _read(path, limit, error, follow_links)
        except error as failure:
            if not tries_left or getattr(failure.__cause__, "errno", None) != errno.ESTALE:
                raise
    raise AssertionError("the last try returns or raises")


def _read(path: Path, limit: int, error: type[LopdError], follow_links: bool) -> bytes:
    pieces: list[bytes] = []
    with open_file(path, error=error, follow_links=follow_links) as stream, reading(path, error):
        size = os.fstat(stream.fileno()).st_size
        read = 0
        # Not `limit` bytes at once: that takes the memory for them, whatever the file has.
        while max(size, read) <= limit and (piece := stream.read(_PIECE)):
            pieces.append(piece)
            read += len(piece)
    if max(size, read) > limit:
        raise error(f"{path}: above {limit:,} bytes, the most that such a file may have")
    return b"".join(pieces)


def read_text(
    path: Path, *, limit: int = TEXT_LIMIT, error: type[LopdError] = DataError, follow_links: bool = True
) -> str:
    """A file's UTF-8 text, without a byte order mark. Raises as `read_bytes`, and `error` for other bytes."""
    return _decode(read_bytes(path, limit=limit, error=error, follow_links=follow_links), str(path), error)


def read_lines(
    path: Path, *, limit: int = LINE_LIMIT, error: type[LopdError] = DataError, follow_links: bool = True
) -> Iterator[tuple[int, str]]:
    """(number from 1, text with its line end) of each line of a UTF-8 file, one at a time in memory.

    Raises as `read_text`, naming the line.
    """
    with open_file(path, error=error, follow_links=follow_links) as stream:
        yield from lines_of(stream, path, limit=limit, error=error)


def lines_of(
    stream: BinaryIO, path: Path, *, limit: int = LINE_LIMIT, error: type[LopdError] = DataError
) -> Iterator[tuple[int, str]]:
    """As `read_lines`, of what is open already: the file at `path`."""
    number = 0
    while True:
        with reading(path, error):
            line = stream.readline(limit + 1)
        if not line:
            return
        number += 1
        where = f"{path}:{number}"
        if len(line) > limit:
            raise error(f"{where}: a line above {limit:,} bytes: it is no sample of text")
        yield number, _decode(line, where, error, first=number == 1)


def read_json(
    path: Path, *, limit: int = TEXT_LIMIT, error: type[LopdError] = DataError, follow_links: bool = True
) -> Any:
    """The value of a JSON file. Raises as `read_text` and `parse_json`."""
    text = read_text(path, limit=limit, error=error, follow_links=follow_links)
    return parse_json(text, str(path), error)


def read_object(
    path: Path, *, limit: int = TEXT_LIMIT, error: type[LopdError] = DataError, follow_links: bool = True
) -> dict[str, Any]:
    """As `read_json`, of a file that must hold a JSON object."""
    value = read_json(path, limit=limit, error=error, follow_links=follow_links)
    if not isinstance(value, dict):
        raise error(f"{path}: not a JSON object, but {type(value).__name__}")
    return value


def parse_json(text: str, where: str, error: type[LopdError] = DataError) -> Any:
    """The value of a JSON text, which any reader takes for the same.

    Raises `error`, naming `where`, for what is no JSON, and for what parsers differ on or cannot hold: NaN
    and infinity, a key given twice, numbers beyond a float, half of a surrogate pair, brackets too deep.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_whole,
        )
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as failure:
        line = f"line {failure.lineno}, " if "\n" in text.rstrip() else ""
        at = f"{line}column {failure.colno}"
        raise error(f"{where}: damaged: not valid JSON ({failure.msg}, {at})") from None
    except UnicodeEncodeError:
        raise error(f"{where}: damaged: half of a surrogate pair, which is no character") from None
    except RecursionError:
        raise error(f"{where}: damaged: brackets more than {DEPTH_LIMIT} deep") from None
    except ValueError as failure:
        raise error(f"{where}: damaged: not valid JSON ({failure})") from None
    if _is_deeper(value, DEPTH_LIMIT):
        raise error(f"{where}: damaged: brackets more than {DEPTH_LIMIT} deep")
    return value


def _decode(data: bytes, where: str, error: type[LopdError], first: bool = True) -> str:
    try:
        return (data.removeprefix(codecs.BOM_UTF8) if first else data).decode("utf-8")
    except UnicodeDecodeError as failure:
        raise error(f"{where}: not UTF-8 text ({failure.reason} at byte {failure.start})") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:100]!r} is given twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _whole(text: str) -> int:
    if len(text) > DIGITS_LIMIT:
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is beyond what a float can hold")
    return value


def _is_deeper(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        inner: list[Any] = []
        for each in level:
            children = each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
            inner += [child for child in children if isinstance(child, dict | list)]
        if not inner:
            return False
        level = inner
    return True
