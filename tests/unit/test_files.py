"""What a path may lead to, and what a file may hold, that somebody else has made."""

from __future__ import annotations

import os
import socket
import stat
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_lopd.errors import ConfigError, DataError, Unreadable
from megatron_lopd.files.digests import sha256_file
from megatron_lopd.files.reading import (
    DEPTH_LIMIT,
    open_file,
    parse_json,
    read_bytes,
    read_json,
    read_lines,
    read_object,
    read_text,
)
from megatron_lopd.files.writing import (
    atomic_file,
    atomic_write_json,
    atomic_write_text,
    copy_file,
    open_to_append,
    settle_mode,
)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # its name may be long, and a socket's may not


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def nowhere(path: Path) -> None:
    path.symlink_to("nothing")


def circle(path: Path) -> None:
    path.symlink_to(path.name)


SPECIAL = [fifo, unix_socket, zeros, nowhere, circle, Path.mkdir]
READERS = [read_bytes, read_text, read_json, read_object, lambda path: [*read_lines(path)], sha256_file]


@pytest.mark.timeout(20)  # a FIFO without a writer blocks for ever
@pytest.mark.parametrize("make", SPECIAL)
@pytest.mark.parametrize("read", READERS)
def test_what_is_no_file_is_refused_at_once(
    tmp_path: Path, make: Callable[[Path], None], read: Callable[[Path], object]
) -> None:
    make(tmp_path / "it")
    with pytest.raises(DataError, match=rf"^{tmp_path}/it: (?!no such)[^\n]+: [^\n]+$"):
        read(tmp_path / "it")


def test_a_link_is_followed_only_where_it_may(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("{}")
    (tmp_path / "it").symlink_to("blob")
    assert read_object(tmp_path / "it") == {}
    with pytest.raises(DataError, match="it: a link, not a file"):
        read_object(tmp_path / "it", follow_links=False)


def test_what_the_system_refuses_may_be_tried_again(tmp_path: Path) -> None:
    """And what is not there, or no file, may not. Reading /proc/self/mem fails so for everybody."""
    with pytest.raises(Unreadable, match=r"^/proc/self/mem: cannot be read: Input/output error: "):
        read_bytes(Path("/proc/self/mem"))
    with pytest.raises(ConfigError, match=r"^/proc/self/mem: cannot be read: "):
        read_bytes(Path("/proc/self/mem"), error=ConfigError)
    with pytest.raises(DataError) as missing:
        read_bytes(tmp_path / "it")
    assert not isinstance(missing.value, Unreadable)


def test_no_more_is_read_than_there_may_be(tmp_path: Path) -> None:
    path = tmp_path / "it"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)  # a hole of a terabyte
    for read in (read_bytes, read_json, lambda path: [*read_lines(path)]):
        with pytest.raises(DataError, match=r"it(:1)?: .*above [\d,]+ bytes"):
            read(path)
    path.write_bytes(b"a\n" + b"b" * 20)
    lines = read_lines(path, limit=10)
    assert next(lines) == (1, "a\n")
    with pytest.raises(DataError, match="it:2: a line above 10 bytes"):
        next(lines)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[1] 2", "not valid JSON"),
        ("NaN", "NaN is no number"),
        ('{"a": [-Infinity]}', "-Infinity is no number"),
        ("1e999", "beyond what a float"),
        ("9" * 5000, "not valid JSON"),
        ('{"a": {"b": 1, "b": 1}}', "'b' is given twice"),
        (r'"\ud800"', "surrogate"),
        (r'{"\uDC00": 1}', "surrogate"),
        ("[" * 100_000, "brackets"),
        ("[" * 300 + "]" * 300, "brackets"),
        ('{"a":' * (DEPTH_LIMIT + 1) + "1" + "}" * (DEPTH_LIMIT + 1), "brackets"),
    ],
)
def test_json_that_readers_may_differ_on_is_refused(text: str, why: str) -> None:
    with pytest.raises(DataError, match=rf"^here: damaged: [^\n]*{why}[^\n]*$"):
        parse_json(text, "here")


def test_json_that_all_read_alike_is_read(tmp_path: Path) -> None:
    inner = DEPTH_LIMIT - 2
    deep = "[" * inner + "]" * inner
    text = rf'{{"\ud83d\ude00": [1e308, -0.5, 12345678901234567890, "\\ud800", null, {deep}]}}'
    assert [*parse_json(text, "here")] == ["😀"]
    (tmp_path / "it").write_bytes(b"\xef\xbb\xbf[1]\n")  # as Windows saves it
    assert read_json(tmp_path / "it") == [1]
    assert [*read_lines(tmp_path / "it")] == [(1, "[1]\n")]


def write_text(path: Path) -> None:
    atomic_write_text(path, "ours")


def write_json(path: Path) -> None:
    atomic_write_json(path, "ours")


def write_copy(path: Path) -> None:
    source = path.with_name("source")
    source.write_text("ours")
    copy_file(source, path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("write", [write_text, write_json, write_copy])
def test_what_is_written_replaces_what_lay_there(tmp_path: Path, write: Callable[[Path], None]) -> None:
    """A link leads to somebody's file; a FIFO would block."""
    theirs, path = tmp_path / "theirs", tmp_path / "it"
    theirs.write_text("theirs")
    for make in (lambda: path.symlink_to(theirs), lambda: os.mkfifo(path), lambda: os.link(theirs, path)):
        path.unlink(missing_ok=True)
        make()
        write(path)
        assert "ours" in path.read_text()
        assert stat.S_ISREG(path.lstat().st_mode)
    assert theirs.read_text() == "theirs"
    assert {each.name for each in tmp_path.iterdir()} <= {"theirs", "it", "source"}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", SPECIAL)
def test_nothing_is_added_to_what_is_no_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "it")
    with pytest.raises(DataError, match=rf"^{tmp_path}/it: [^\n]+$"):
        open_to_append(tmp_path / "it")
    theirs = tmp_path / "theirs"
    theirs.write_text("theirs")
    (tmp_path / "link").symlink_to(theirs)
    with pytest.raises(ConfigError, match="link: a link"):
        open_to_append(tmp_path / "link", ConfigError)
    assert theirs.read_text() == "theirs"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_modes_are_the_umasks(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a")
        with atomic_file(tmp_path / "b", permissions=0o600) as stream:
            stream.write(b"a secret")
        (tmp_path / "c").touch(0o600)
        settle_mode(tmp_path / "c")
        open_to_append(tmp_path / "d").close()
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    usual = 0o666 & ~umask
    assert modes == {"a": usual, "b": 0o600 & ~umask, "c": usual, "d": usual}


def test_what_becomes_no_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look and the opening."""
    path = tmp_path / "it"
    path.write_text("{}")
    real = os.open

    def swapped(name: object, *rest: int) -> int:
        path.unlink()
        os.mkfifo(path)
        return real(path, *rest)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(DataError, match="it: a FIFO"):
        open_file(path)


def test_a_file_takes_no_more_memory_than_it_has_bytes(tmp_path: Path) -> None:
    """Not what its limit would allow; and none where it is above that."""
    (tmp_path / "small").write_bytes(b"1 2 3")
    with (tmp_path / "large").open("wb") as stream:
        stream.truncate(1 << 33)
    tracemalloc.start()
    try:
        assert read_bytes(tmp_path / "small", limit=1 << 30) == b"1 2 3"
        with pytest.raises(DataError, match=r"large: above 1,073,741,824 bytes"):
            read_bytes(tmp_path / "large", limit=1 << 30)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()
