"""One check's process and all that it starts: begun, watched, and ended to the last one. Linux."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tools.gpu.child import LEFT_OUT
from tools.gpu.registry import Check
from tools.gpu.results import Ending

MARK = "LOPD_GPU_CHECK"  # in the environment of a check and of what it starts, whatever their session
LOG_LIMIT = 256 * 2**20  # bytes of output after which a check is ended
LOG_KEPT = 2**20  # of a longer log, these many bytes of each end are kept
STACK_SECONDS = 2.0  # for all processes to write their stacks down before they are killed
DEATH_SECONDS = 20.0  # after a kill -9; a driver can hold a process for longer


class Running:
    """A check that was begun, in a session of its own."""

    def __init__(
        self,
        check: Check,
        out: Path,
        scratch: Path,
        environment: Mapping[str, str],
        toy: bool,
        left: float,
    ) -> None:
        """`left`: seconds of the budget, which may end it before its own limit does."""
        self.check, self._began = check, time.monotonic()
        own = check.toy_limit if toy else check.limit
        self._limit, self._is_cut = min(left, own), left < own
        self._deadline = self._began + self._limit
        self.log = out / "logs" / f"{check.name}.log"
        self._told = out / "figures" / f"{check.name}.jsonl"
        self._mark = uuid.uuid4().hex
        for folder in (self.log.parent, self._told.parent, scratch):
            folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-P", "-m", "tools.gpu.child", check.target, str(scratch), str(self._told)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *(["--toy"] if toy else [])],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**environment, MARK: self._mark, "TMPDIR": str(scratch)},
                start_new_session=True,
                preexec_fn=_prepare,
            )

    def poll(self) -> Ending | None:
        """How it ended, once it has; one that is over its limits is ended now."""
        code = self._process.poll()
        if code is not None:
            return self.end(*self._verdict(code))
        if time.monotonic() > self._deadline:
            self._write_stacks()
            stood = f"after {self._limit:.0f} s; where it stood is in its log"
            if self._is_cut:  # no fault of the machine's
                return self.end("left out", f"budget: ended {stood}")
            return self.end("timed out", stood)
        if self.log.stat().st_size > LOG_LIMIT:
            return self.end("killed", f"it wrote more than {LOG_LIMIT >> 20} MB of output")
        return None

    def end(self, status: str, reason: str) -> Ending:
        """Kill what is left of it, and gather what it told."""
        seconds = time.monotonic() - self._began
        if not self._kill():
            reason = f"{reason}; a process of it outlives kill -9".lstrip("; ")
        figures = [record for record in self._records() if "figure" in record]
        _shorten(self.log)
        return Ending(self.check.name, status, seconds, reason, str(self.log), figures)

    def _verdict(self, code: int) -> tuple[str, str]:
        if code == 0:
            return "ok", ""
        if code < 0:
            name = signal.Signals(-code).name
            memory = ": out of the machine's memory, or by hand" if name == "SIGKILL" else ""
            return "killed", f"by {name}{memory}"
        told = [str(record["reason"]) for record in self._records() if "reason" in record]
        return "left out" if code == LEFT_OUT else "failed", told[-1] if told else _last_line(self.log)

    def _records(self) -> Iterator[dict[str, Any]]:
        """What was told; the last line may be torn."""
        if self._told.exists():
            for line in self._told.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict):
                    yield record

    def _kill(self) -> bool:
        """End every process with the mark; False when one would not go."""
        deadline = time.monotonic() + DEATH_SECONDS
        while True:
            for pid in {*marked(self._mark), *([self._process.pid] if self._process.poll() is None else [])}:
                _signal(pid, signal.SIGKILL)
            gone = self._process.poll() is not None and not marked(self._mark)
            if gone or time.monotonic() > deadline:
                return gone
            time.sleep(0.02)

    def _write_stacks(self) -> None:
        """Python's faulthandler writes every thread's into the log: one process at a time, or lines mix."""
        deadline = time.monotonic() + STACK_SECONDS
        for pid in marked(self._mark):
            _signal(pid, signal.SIGABRT)
            while _is_marked(pid, self._mark) and time.monotonic() < deadline:
                time.sleep(0.02)


def marked(mark: str) -> list[int]:
    """Processes that were started with this mark in their environment, by us or by what we started."""
    pids = sorted(int(folder.name) for folder in Path("/proc").glob("[0-9]*"))
    return [pid for pid in pids if _is_marked(pid, mark)]


def _is_marked(pid: int, mark: str) -> bool:
    try:
        return f"{MARK}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # another user's, or gone by now
        return False


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _prepare() -> None:
    """Before the check's Python starts: it dies with the runner, and leaves no core behind."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, prctl(2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode("utf-8", "replace").split("\n")
    shown = ["".join(c for c in line if c.isprintable()).strip()[:300] for line in lines]
    return next((line for line in reversed(shown) if line), "it said nothing")


def _shorten(log: Path) -> None:
    """Keep both ends of a long log."""
    size = log.stat().st_size
    if size <= 2 * LOG_KEPT:
        return
    with log.open("r+b") as file:
        head = file.read(LOG_KEPT)
        file.seek(size - LOG_KEPT)
        tail = file.read()
        file.seek(0)
        file.write(head + f"\n... {size - 2 * LOG_KEPT:,} bytes left out ...\n".encode() + tail)
        file.truncate()
