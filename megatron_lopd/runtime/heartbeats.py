"""Ranks of one job that watch each other: one that stops ends the job in time, with its number.

Rank 0 listens, every other rank keeps a connection to it, and each says now and then where it is. A process
that ends closes its connection, and is the launcher's to notice. One that is suspended, or whose machine is
gone, falls silent: after `silence_seconds` whoever misses it names it and ends, and rank 0 tells the others.

A rank that lives may hang too, in a read from a disk that does not answer, say, and all that wait for it then
hang with it. Once steps are done, none of which has come for STUCK_SECONDS, the job ends, and those are named
that are furthest behind. Where work without such a measure may take long there is no such limit: see `at`.

Time in which this process is itself suspended, by a scheduler, say, is not counted.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn, Protocol, cast

from megatron_lopd.errors import ConfigError
from megatron_lopd.runtime.display import duration
from megatron_lopd.runtime.environment import LOOPBACK

# Of a process that lives. One library call that keeps Python to itself may take a while; a virtual machine
# that moves to another host stands still for seconds.
SILENCE_SECONDS = 120.0
SILENCE = "LOPD_SILENCE_SECONDS"  # in the environment, instead
# For a micro-batch, or the reading of the next ones' data.
STUCK_SECONDS = 90 * 60.0
BEATS_A_SILENCE = 24
PARTING_SECONDS = 1.0  # for the others to read the last word, which a connection that is reset would lose
NAMED = 3  # ranks, at most, of those that hang
LONGEST_LINE = 4096  # bytes
KEY = "lopd heartbeats"  # in the store, under which rank 0 says where it listens


class _Store(Protocol):
    """What brings ranks together, as far as it is needed here: torch.distributed's."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...


@dataclass
class Standing:
    """Where a rank is. `moves` counts whatever it has done; `step` is -1 where none is under way."""

    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    where: str = "starting"
    step: int = -1
    moves: int = 0


_own = Standing()


def at(where: str, step: int = -1) -> None:
    """Say what this process does now: it may take as long as it likes, unless it is part of a `step`."""
    _own.where, _own.step, _own.moves = where, step, _own.moves + 1


def moved() -> None:
    """Say that it gets on."""
    _own.moves += 1


def silence_seconds() -> float:
    """For how long a rank or worker may show no sign of life. ConfigError for what is no such time."""
    text = os.environ.get(SILENCE, str(SILENCE_SECONDS))
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) < math.inf:
            return seconds
    raise ConfigError(f"{SILENCE}={text} is no number of seconds: set it to one above 0, or unset it")


def join(rank: int, store: _Store, master: str) -> None:
    """Watch, and be watched, from now on, in a thread; `master` is the host of rank 0. Every rank calls."""
    _own.host, _own.pid = socket.gethostname(), os.getpid()
    silence = silence_seconds()
    if rank == 0:
        listener = _listen(master)
        token = secrets.token_hex(8)
        store.set(KEY, f"{listener.getsockname()[1]} {token}")
        target: Callable[[], None] = _Listening(listener, token, silence).run
    else:
        port, token = store.get(KEY).decode().split()
        try:
            connection = socket.create_connection((master, int(port)), timeout=silence)
        except OSError as error:
            print(
                f"lopd: rank {rank} cannot reach rank 0 at {master}:{port} ({error.strerror or error}): "
                "should one of them stop, the other will not notice",
                file=sys.stderr,
                flush=True,
            )
            return
        target = _Connected(connection, rank, token, silence).run
    threading.Thread(target=target, daemon=True, name="heartbeats").start()


def _listen(master: str) -> socket.socket:
    if master == LOOPBACK:  # all ranks are here: no other machine need reach it
        return socket.create_server((LOOPBACK, 0), backlog=1024)
    try:
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    except (OSError, ValueError):  # there is no IPv6 here
        return socket.create_server(("", 0), backlog=1024)


@dataclass
class _Peer:
    """A rank as it is seen from another: seconds since it was heard of, and since it has moved."""

    rank: int
    standing: Standing
    quiet: float = 0.0
    still: float = 0.0

    def hear(self, standing: Standing) -> None:
        self.quiet = 0.0
        if standing.moves != self.standing.moves:
            self.still = 0.0
        self.standing = standing

    def wait(self, seconds: float) -> None:
        self.quiet += seconds
        self.still += seconds

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.standing.pid} on {self.standing.host}; {self.standing.where})"


class _Line:
    """A connection, cut into lines. `open` is False once the other side has ended."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(0)
        self.socket, self.open = connection, True
        self._received = b""

    def send(self, value: object) -> None:
        """Drops what does not go at once: the next one will say the same."""
        try:
            self.socket.send(json.dumps(value).encode() + b"\n")
        except BlockingIOError:
            pass
        except OSError:
            self.open = False

    def receive(self) -> list[object]:
        """What has come in whole lines."""
        try:
            data = self.socket.recv(1 << 16)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError:
            data = b""
        *lines, self._received = (self._received + data).split(b"\n")
        if not data or len(self._received) > LONGEST_LINE:
            self.open = False
        found: list[object] = []
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                found.append(json.loads(line))
        return found


class _Clock:
    """Seconds that pass here while this process runs."""

    def __init__(self, beat: float) -> None:
        self._beat, self._before, self._since_beat = beat, time.monotonic(), beat

    def passed(self) -> float:
        now = time.monotonic()
        seconds, self._before = min(now - self._before, 2 * self._beat), now
        self._since_beat += seconds
        return seconds

    def is_due(self) -> bool:
        """Whether it is time for a heartbeat, which it then is not for a while."""
        if self._since_beat < self._beat:
            return False
        self._since_beat = 0.0
        return True


class _Listening:
    """Rank 0's side."""

    def __init__(self, listener: socket.socket, token: str, silence: float) -> None:
        self._listener, self._token, self._silence = listener, token, silence
        self._beat = silence / BEATS_A_SILENCE
        self._ranks: dict[_Line, _Peer] = {}
        self._selector = selectors.DefaultSelector()
        listener.settimeout(0)
        self._selector.register(listener, selectors.EVENT_READ)

    def run(self) -> None:
        clock, own = _Clock(self._beat), _Peer(0, Standing())
        while True:
            ready = {key.data for key, _ in self._selector.select(self._beat)}
            passed = clock.passed()
            own.wait(passed)
            own.hear(Standing(**asdict(_own)))
            for each in self._ranks.values():
                each.wait(passed)
            if None in ready:
                self._accept()
            for line in ready - {None}:
                self._hear(line)
            if clock.is_due():
                for line in [*self._ranks]:
                    line.send({"standing": asdict(_own)})
            self._judge([own, *self._ranks.values()])

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            line = _Line(self._listener.accept()[0])
            self._selector.register(line.socket, selectors.EVENT_READ, line)

    def _hear(self, line: _Line) -> None:
        for said in line.receive():
            match said:
                case [int(rank), self._token, dict(plain)]:
                    standing = Standing(**cast(dict[str, Any], plain))
                    self._ranks.setdefault(line, _Peer(rank, standing)).hear(standing)
                case _:  # not one of this job
                    line.open = False
        if not line.open:
            self._selector.unregister(line.socket)
            line.socket.close()
            self._ranks.pop(line, None)

    def _judge(self, ranks: list[_Peer]) -> None:
        silent = [each for each in ranks if each.quiet >= self._silence]
        if silent:
            names = ", ".join(map(str, sorted(silent, key=lambda each: each.rank)[:NAMED]))
            self._end(f"{names}: no sign of life for {duration(self._silence)}")
        hanging = [each for each in ranks if each.standing.step >= 0]
        if hanging and min(each.still for each in ranks) >= STUCK_SECONDS:
            hanging.sort(key=lambda each: (each.standing.step, -each.still, each.rank))
            names = ", ".join(map(str, hanging[:NAMED]))
            self._end(f"no rank has moved for {duration(STUCK_SECONDS)}; furthest behind: {names}")

    def _end(self, reason: str) -> NoReturn:
        for line in self._ranks:
            line.send({"end": True})
        end_job(reason, PARTING_SECONDS)


class _Connected:
    """The side of every other rank."""

    def __init__(self, connection: socket.socket, rank: int, token: str, silence: float) -> None:
        self._line, self._rank, self._token, self._silence = _Line(connection), rank, token, silence
        self._beat = silence / BEATS_A_SILENCE

    def run(self) -> None:
        clock, first = _Clock(self._beat), _Peer(0, Standing("unknown host", 0))
        selector = selectors.DefaultSelector()
        selector.register(self._line.socket, selectors.EVENT_READ)
        # One of many that miss rank 0 says so first, and the launcher ends the others.
        patience = self._silence + self._beat * (1 + min(self._rank - 1, BEATS_A_SILENCE))
        while self._line.open:
            if clock.is_due():
                self._line.send([self._rank, self._token, asdict(_own)])
            ready = selector.select(self._beat)
            first.wait(clock.passed())
            for said in self._line.receive() if ready else []:
                match said:
                    case {"standing": dict(plain)}:
                        first.hear(Standing(**cast(dict[str, Any], plain)))
                    case _:
                        os._exit(1)  # rank 0 has said why
            if first.quiet >= patience:
                end_job(f"{first}: no sign of life for {duration(self._silence)}")


def end_job(reason: str, seconds: float = 0.0) -> NoReturn:
    """End this process, and by that its job, after so many seconds: it waits for what will not come."""
    print(
        f"lopd: {reason}: the job ends: look at that machine, and run the same command again to go on",
        file=sys.stderr,
        flush=True,
    )
    time.sleep(seconds)
    os._exit(1)
