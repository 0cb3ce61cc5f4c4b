"""Ranks that watch each other: who stops is named, and nobody else; and what a launcher watches."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_lopd.runtime import heartbeats, launch

RANKS = 3
SILENCE = 1.0  # seconds
SECONDS = 30.0


class FileStore:
    """As torch.distributed's, as far as it is needed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def set(self, key: str, value: str) -> None:
        temporary = self._directory / "temporary"
        temporary.write_text(value)
        temporary.rename(self._directory / key)

    def get(self, key: str) -> bytes:
        while not (self._directory / key).exists():
            time.sleep(0.01)
        return (self._directory / key).read_bytes()


class Job:
    """RANKS forks that have joined, each of which then does `work(rank)`."""

    def __init__(self, directory: Path, work: Callable[[int], None]) -> None:
        self._said = [directory / f"said-{rank}" for rank in range(RANKS)]
        self.pids = [self._start(directory, rank, work) for rank in range(RANKS)]

    def _start(self, directory: Path, rank: int, work: Callable[[int], None]) -> int:
        if pid := os.fork():
            return pid
        try:
            sys.stderr = self._said[rank].open("w")
            heartbeats.join(rank, FileStore(directory), "127.0.0.1")
            work(rank)
        finally:
            sys.stderr.flush()
            os._exit(0)

    def said(self) -> str:
        return "".join(path.read_text() for path in self._said)

    def exit_codes(self, ranks: list[int]) -> list[int]:
        codes = []
        for rank in ranks:
            deadline = time.monotonic() + SECONDS
            while not (ended := os.waitpid(self.pids[rank], os.WNOHANG))[0]:
                assert time.monotonic() < deadline, f"rank {rank} did not end"
                time.sleep(0.02)
            self.pids[rank] = 0
            codes.append(os.waitstatus_to_exitcode(ended[1]))
        return codes

    def signal(self, number: signal.Signals, ranks: list[int]) -> None:
        for rank in ranks:
            os.kill(self.pids[rank], number)

    def end(self) -> None:
        for pid in filter(None, self.pids):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


Start = Callable[[Callable[[int], None]], Job]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setenv(heartbeats.SILENCE, str(SILENCE))
    jobs: list[Job] = []

    def start(work: Callable[[int], None]) -> Job:
        jobs.append(Job(tmp_path, work))
        while not (tmp_path / heartbeats.KEY).exists():
            time.sleep(0.01)
        return jobs[0]

    yield start
    jobs[0].end()


def live(rank: int) -> None:
    heartbeats.at(f"step {rank + 5}")
    time.sleep(SECONDS)


@pytest.mark.parametrize("stopped", [0, RANKS - 1])
def test_a_rank_that_stops_ends_the_job_with_its_number(start: Start, stopped: int) -> None:
    job = start(live)
    time.sleep(SILENCE / 2)
    job.signal(signal.SIGSTOP, [stopped])
    others = [rank for rank in range(RANKS) if rank != stopped]
    assert job.exit_codes(others) == [1, 1]
    lines = job.said().splitlines()  # of rank 0 all others speak, unless a launcher has ended them
    assert len(lines) == 1 or stopped == 0
    for line in lines:
        assert f"lopd: rank {stopped} (pid {job.pids[stopped]} on " in line
        assert f"; step {stopped + 5}): no sign of life for 1s: the job ends" in line


def test_a_rank_that_ends_is_not_missed_nor_is_a_job_that_was_suspended_whole(
    start: Start,
) -> None:
    job = start(lambda rank: time.sleep(SILENCE / 2 if rank == 2 else 5 * SILENCE))
    assert job.exit_codes([2]) == [0]
    job.signal(signal.SIGSTOP, [0, 1])
    time.sleep(2 * SILENCE)
    job.signal(signal.SIGCONT, [1, 0])
    assert job.exit_codes([0, 1]) == [0, 0]
    assert job.said() == ""


def test_a_job_in_which_nothing_moves_ends_with_who_is_furthest_behind(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their heartbeats come. Where no step is under way it may take as long as it likes."""
    monkeypatch.setattr(heartbeats, "STUCK_SECONDS", SILENCE)

    def work(rank: int) -> None:
        time.sleep(2 * SILENCE)
        heartbeats.at(f"step {7 - (rank == 1)}", 7 - (rank == 1))
        time.sleep(SECONDS)

    began = time.monotonic()
    job = start(work)
    assert job.exit_codes([0, 1, 2]) == [1, 1, 1]
    assert time.monotonic() - began > 2 * SILENCE
    (line,) = job.said().splitlines()
    assert "no rank has moved for 1s; furthest behind: rank 1 (pid " in line


def test_a_stranger_that_connects_disturbs_nobody(start: Start, tmp_path: Path) -> None:
    job = start(lambda rank: time.sleep(2 * SILENCE))
    port = int((tmp_path / heartbeats.KEY).read_text().split()[0])
    for data in (
        b"",
        b"\0" * 100_000,
        b"[[[[\n",
        b'[1, "guess", {}]\n',
        b'{"end": true}\n',
        b"GET / HTTP/1.1\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(data)
    assert job.exit_codes([0, 1, 2]) == [0, 0, 0]
    assert job.said() == ""


# In the place of a Python. Rank 1 is woken too late.
SUSPENDED = """#!/bin/bash
[ "$RANK" = 0 ] || { (sleep 8; kill -CONT $$) & kill -STOP $$; }
exec sleep 8
"""


def test_a_rank_that_is_suspended_before_it_has_joined_is_ended_by_its_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others wait for it in their first meeting, and do not watch it yet."""
    (tmp_path / "python").write_text(SUSPENDED)
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.1)
    monkeypatch.setenv(heartbeats.SILENCE, "0.3")
    assert launch.launch(["train"], 2) == (128 + signal.SIGKILL, False)
    said = capsys.readouterr().err
    assert re.match(r"lopd: rank 1 \(pid \d+ on .*\) has been suspended for 1s, and is ended: ", said)


def test_a_process_that_stays_suspended_is_ended_by_its_launcher(
    capsys: pytest.CaptureFixture[str],
) -> None:
    workers = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    try:
        watch = launch._Suspensions(workers, "worker", 0.5)
        workers[1].send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + SECONDS
        while workers[1].poll() is None:
            assert time.monotonic() < deadline
            watch.look()
            time.sleep(0.01)
        assert workers[0].poll() is None
        assert f"lopd: worker 1 (pid {workers[1].pid} on " in capsys.readouterr().err
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
