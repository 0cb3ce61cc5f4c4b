"""A function over many things in a copy of this process, which what others wrote may hang or fill.

The copy is forked: it costs milliseconds and has all that is loaded. Each thing has so much processor time,
and all together so much memory more than this process has; the kernel ends what takes more, in the midst of a
C function too. Processor time, not the clock's: how busy the machine is must not decide what is right.

It keeps the run from accidents, not from an attack: the copy may do what the run may.

And `bound_waiting`, for whoever waits for another process.
"""

from __future__ import annotations

import gc
import os
import pickle
import resource
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from megatron_lopd.runtime.signals import die_with_parent

MEMORY_BYTES = 1 << 30  # more than there is when the copy is made
# Without a word from the copy: a busy machine stretches processor time.
PATIENCE_SECONDS = 120.0
# A copy can wait for ever for a lock that another thread had when it was made. One that sleeps at two looks,
# and had no processor between them, is made again; the last is given all the patience.
LOOK_SECONDS = 2.0
COPIES = 4
# Answers sent at a time: a write each would take longer than most of them.
BATCH_SECONDS = 0.05

_OVER_TIME = signal.SIGPROF
_LONGEST_SECONDS = 1e9  # of waiting, where a user asks for more


@dataclass(frozen=True)
class Failed:
    """What came of one of them in place of a result: in a line, why."""

    reason: str


def bound_waiting(pipe: Connection, seconds: float) -> None:
    """Have a call on a pipe (of `Pipe()`, both ways) that waits for so long raise BlockingIOError.

    The process at its other end may stop in the midst of a message, to or fro.
    """
    whole, part = divmod(min(seconds, _LONGEST_SECONDS), 1)
    limit = struct.pack("@ll", int(whole), int(part * 1e6))  # a struct timeval
    with socket.socket(fileno=os.dup(pipe.fileno())) as same:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            same.setsockopt(socket.SOL_SOCKET, option, limit)


def bounded(
    function: Callable[[Any], Any],
    things: Iterable[Any],
    cpu_seconds: float,
    memory_bytes: int = MEMORY_BYTES,
) -> Iterator[Any]:
    """`function` of each thing, in order, and Failed where it raised or took too much.

    Nothing comes after a Failed: the copy is gone, or of no more use. Results are pickled.
    """
    given, done = list(things), 0
    for copy in range(COPIES):
        left, is_last = given[done:], copy == COPIES - 1
        for result in _of_a_copy(function, left, cpu_seconds, memory_bytes, is_last):
            done += 1
            yield result
            if isinstance(result, Failed):
                return
        if done == len(given):
            return


def _of_a_copy(
    function: Callable[[Any], Any],
    given: list[Any],
    cpu_seconds: float,
    memory_bytes: int,
    is_last: bool,
) -> Iterator[Any]:
    """As `bounded`, by one copy; it ends early where that waits for ever, but for the last."""
    if not given:
        return
    pipe, theirs = Pipe()
    pid = os.fork()
    if not pid:
        # What is garbage here has threads to end, those of a process group, say, that the copy has not got.
        gc.freeze()
        pipe.close()
        _work(function, given, cpu_seconds, memory_bytes, theirs)
    theirs.close()
    got, status = 0, None
    try:
        with pipe:
            bound_waiting(pipe, PATIENCE_SECONDS)
            while got < len(given):
                told, waited, seen = False, 0.0, ""
                while not told and waited < PATIENCE_SECONDS:
                    told, waited = pipe.poll(LOOK_SECONDS), waited + LOOK_SECONDS
                    before, seen = seen, "" if told else _sleeping(pid)
                    if seen and seen == before and not is_last:
                        return
                try:
                    results = pipe.recv() if told else None
                except BlockingIOError:  # stopped in the midst of them
                    results = None
                except (EOFError, ConnectionError):
                    _, status = os.waitpid(pid, 0)
                    yield Failed(_why(status, cpu_seconds, memory_bytes))
                    return
                if results is None:
                    yield Failed(f"it has taken over {PATIENCE_SECONDS:.0f} seconds")
                    return
                for result in results:
                    got += 1
                    yield result
    finally:
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _sleeping(pid: int) -> str:
    """The processor time that a process has had, if it sleeps and waits for no disk; empty otherwise."""
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stream:
        fields = stream.read().rpartition(")")[2].split()
    return " ".join(fields[11:13]) if fields[0] == "S" else ""


def _why(status: int, cpu_seconds: float, memory_bytes: int) -> str:
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == _OVER_TIME:
        return f"it has taken over {cpu_seconds:g} seconds"
    if os.WIFSIGNALED(status):
        return f"its process was ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"it needs more than {memory_bytes >> 20} MB"


def _work(
    function: Callable[[Any], Any],
    things: list[Any],
    cpu_seconds: float,
    memory_bytes: int,
    pipe: Connection,
) -> None:
    """In the copy: results to the pipe, a batch at a time. Never returns."""
    try:
        die_with_parent()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):  # the run's to answer
            signal.signal(number, signal.SIG_IGN)
        signal.signal(_OVER_TIME, signal.SIG_DFL)
        _bound_memory(memory_bytes)
        ready: list[Any] = []
        sent = time.monotonic()
        for thing in things:
            signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
            try:
                result = function(thing)
            except MemoryError:
                result = Failed(f"it needs more than {memory_bytes >> 20} MB")
            except Exception as error:  # noqa: BLE001 - what others wrote raises what it likes
                result = Failed(" ".join((str(error) or type(error).__name__).split())[:400])
            ready.append(result)
            if time.monotonic() - sent > BATCH_SECONDS or isinstance(result, Failed):
                pipe.send_bytes(pickle.dumps(ready))
                ready, sent = [], time.monotonic()
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send_bytes(pickle.dumps(ready))
    except BaseException:  # noqa: BLE001 - whoever asks sees that the pipe has closed
        os._exit(1)
    os._exit(0)


def _bound_memory(more: int) -> None:
    """No address space beyond `more` than there is now, and no core files."""
    with open("/proc/self/statm", encoding="ascii") as stream:
        now = int(stream.read().split()[0]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = now + more if most == resource.RLIM_INFINITY else min(now + more, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
