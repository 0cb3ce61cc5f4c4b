"""A copy of a process has locks that nobody in it gives back, and garbage whose threads it has not got."""

from __future__ import annotations

import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from megatron_lopd.runtime import bounded


def test_a_copy_that_waits_for_ever_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "LOOK_SECONDS", 0.1)
    held = threading.Lock()

    def twice(number: int) -> int:
        with held:
            return 2 * number

    held.acquire()
    threading.Timer(0.05, held.release).start()  # here, and not in the copy that there is by then
    assert list(bounded.bounded(twice, range(5), cpu_seconds=5)) == [0, 2, 4, 6, 8]


def test_the_last_copy_is_given_all_the_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(bounded, "PATIENCE_SECONDS", 0.3)
    held = threading.Lock()
    with held:
        (failed,) = bounded.bounded(lambda number: held.acquire(), [1], cpu_seconds=5)
    assert failed == bounded.Failed("it has taken over 0 seconds")


@pytest.mark.timeout(60)
def test_a_copy_that_is_stopped_in_the_midst_of_an_answer_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded, "PATIENCE_SECONDS", 0.5)
    look = Connection.poll

    def look_and_stop(pipe: Connection, seconds: float) -> bool:
        if ready := look(pipe, seconds):  # it writes, and more than a pipe holds
            os.kill(int((tmp_path / "copy").read_text()), signal.SIGSTOP)
        return ready

    def long(number: int) -> bytes:
        (tmp_path / "copy").write_text(str(os.getpid()))
        return bytes(1 << 24)

    monkeypatch.setattr(Connection, "poll", look_and_stop)
    taken = list(bounded.bounded(long, [1], cpu_seconds=5))
    assert taken == [bounded.Failed("it has taken over 0 seconds")]


def test_a_process_may_have_more_files_open_than_select_can_count() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2048, hard), hard))
    opened = [os.open(os.devnull, os.O_RDONLY)]
    try:
        while opened[-1] < 1024:  # FD_SETSIZE
            opened.append(os.dup(opened[0]))
        assert list(bounded.bounded(abs, [-1, 2], cpu_seconds=5)) == [1, 2]
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_copy_leaves_this_process_garbage_alone() -> None:
    """A process group's end waits for threads of its own, which a copy has not got."""
    ended: list[Garbage] = []

    class Garbage:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            ended.append(self)

    def collect(number: int) -> int:
        gc.collect()
        return len(ended)

    gc.disable()
    try:
        Garbage()
        assert list(bounded.bounded(collect, [1], cpu_seconds=5)) == [0]
        assert collect(1) == 1
    finally:
        gc.enable()


_ENDLESS = """
import os, time
from megatron_lopd.runtime.bounded import bounded
def tell(number):
    print(os.getpid(), flush=True)
    time.sleep(600)
list(bounded(tell, [1], cpu_seconds=5))
"""


@pytest.mark.timeout(60)
def test_a_copy_ends_with_the_process_that_made_it() -> None:
    """It answers no stop signal, and holds what its parent had open: a stage's lock, say."""
    with subprocess.Popen([sys.executable, "-c", _ENDLESS], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        copy = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
        assert parent.stdout.read() == ""  # which comes to an end when the copy has
    while not has_ended(copy):  # its files are closed a moment before
        time.sleep(0.01)


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True
