"""The operating system refuses a call on a file, and its name is in what is said, whichever call it was."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from megatron_lopd.cli import main
from megatron_lopd.commands import verify
from megatron_lopd.errors import DataError
from megatron_lopd.files.writing import atomic_file, fsync_directory, fsync_file, open_to_append, remove
from megatron_lopd.pipeline import execute
from megatron_lopd.pipeline.stage import Plan
from megatron_lopd.runtime.claim_files import announce, newest
from tests.shims.file_faults import Failing, Faults, bearing, build, failures, run_bearing

NUMBER = errno.EDQUOT


def add_line(path: Path) -> None:
    open_to_append(path).close()


def write_bytes(path: Path) -> None:
    with atomic_file(path) as stream:
        stream.write(b"text")


def announce_parts(path: Path) -> None:
    announce(path, {"rollouts-00000.arrow": 1})


def list_claims(path: Path) -> None:
    newest(path)


REFUSED: list[tuple[str, Callable[[Path], object], str]] = [
    ("stat", add_line, "file"),
    ("open", write_bytes, "file"),
    ("fsync", write_bytes, "file"),
    ("fsync", fsync_file, "file"),
    ("stat", fsync_file, "file"),
    ("fsync", fsync_directory, "folder"),
    ("rmdir", remove, "folder"),
    ("unlink", remove, "folder"),
    ("opendir", list_claims, "folder"),
    ("write", announce_parts, "folder"),
    ("mkdir", announce_parts, "new"),
]


def refuse_each(place: Path) -> None:
    for number, (call, function, name) in enumerate(REFUSED):
        path = place / str(number) / name
        (path.parent / "folder/.claims").mkdir(parents=True)
        (path.parent / "file").touch()
        (path.parent / "folder/file").touch()
        said = "nothing"
        with bearing(Faults(place, failing=(Failing(call, NUMBER),))):
            try:
                function(path)
            except DataError as error:
                said = str(error)
            except OSError as error:  # for who knows better what to do, and else for `main`
                said = str(error)
            assert failures(), (call, function)
        assert str(path) in said, (call, function, said)
        assert os.strerror(NUMBER) in said, (call, function, said)


def begin_beside_one_who_is_stuck(directory: Path) -> None:
    execute.BEGINNING_SECONDS = 0.2
    for number in (errno.EAGAIN, errno.ENOLCK, errno.EIO):
        with (
            bearing(Faults(directory, failing=(Failing("flock", number),))),
            (directory / "lock").open("a") as lock,
        ):
            execute._begin_among_workers("generate", directory, Plan({}, {}, "proved"), lock)
            assert failures()


def test_a_call_that_is_refused_names_its_file(tmp_path: Path) -> None:
    run_bearing(build(tmp_path), None, refuse_each, tmp_path)


@pytest.mark.timeout(60)
def test_nobody_waits_for_ever_for_a_lock(tmp_path: Path) -> None:
    (tmp_path / "stage").mkdir()
    run_bearing(build(tmp_path), None, begin_beside_one_who_is_stuck, tmp_path / "stage")


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_name_that_no_file_system_takes_is_one_line(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "x" * 300
    assert main([command, name]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"lopd {command}: {name}")
    assert f"cannot be read: {os.strerror(errno.ENAMETOOLONG)}: check the disk" in said
    assert said.count("\n") == 1


def test_what_nobody_has_an_answer_for_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path) -> NoReturn:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), path)

    monkeypatch.setattr(verify, "verify_path", refuse)
    assert main(["verify", "a/run"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        f"lopd verify: a/run: cannot be read or written: {os.strerror(errno.EDQUOT)}: check"
    )
    assert said.count("\n") == 1
