"""Who works on which part of an artifact: claims that outlive a dead worker and never a live one.

Workers are processes on any number of machines that share a directory; they know of each other by files.
Part `shard` is claimed by creating `.claims/shard.N`, N one more than the highest there is: exactly one
process can create it, and whoever has the highest owns the part. Its owner rewrites it at every heartbeat.

A claim is stale when its process is known to be gone, or when its heartbeat has not changed for `lease`
seconds by the clock of whoever watches: clocks of two machines are never compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from megatron_lopd.artifacts.files import TEMPORARY_PREFIX, atomic_write_json, read_json
from megatron_lopd.errors import DataError, LopdError

CLAIMS = ".claims"
PARTS = "parts"  # no dot in it, as there is in every claim
LEASE_SECONDS = 60.0
BEATS_A_LEASE = 12
POLL_SECONDS = 1.0  # between two looks at what others have claimed
# A part that failed this often fails for good. Deaths do not count: a lost node is no fault of the part.
ATTEMPTS = 3
BACKOFF_SECONDS = 5.0  # after the first failure; twice as long after each further one


@dataclass(frozen=True)
class Owner:
    """A process, told apart from every other one on any machine."""

    host: str
    boot: str
    pid_namespace: int
    pid: int
    started: int  # clock ticks after boot

    @staticmethod
    def here() -> Owner:
        """This process."""
        return Owner(
            host=socket.gethostname(),
            boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            pid_namespace=os.stat("/proc/self/ns/pid").st_ino,
            pid=os.getpid(),
            started=_start_of(os.getpid()) or 0,
        )

    def is_gone(self, watcher: Owner) -> bool:
        """Whether the process has ended for certain, which only one that can see it may say."""
        if (self.host, self.boot, self.pid_namespace) != (watcher.host, watcher.boot, watcher.pid_namespace):
            return False
        return _start_of(self.pid) != self.started


@dataclass(frozen=True)
class ClaimState:
    """What a claim's file says.

    `beat` counts heartbeats; `done` of `total` samples are made, at `rate` tokens/s and `done_per_second`.
    """

    part: str
    generation: int
    owner: Owner
    status: Literal["working", "released", "failed"] = "working"
    beat: int = 0
    done: int = 0
    total: int = 0
    rate: float = 0.0
    done_per_second: float = 0.0
    error: str = ""


class ClaimLost(LopdError):  # noqa: N818 - what happened, as StopRequested
    """Another worker took the part over while this one was not heard of: what it made is dropped."""


class PartFailed(LopdError):  # noqa: N818
    """A part, or a worker at one part after another, has failed as often as it may."""


def read_claims(directory: Path) -> dict[str, list[ClaimState]]:
    """The claims on each part of the artifact in `directory`, oldest first. DataError for a damaged one."""
    parts = {path.stem for path in (directory / CLAIMS).glob("[!.]*.*")}
    return {part: states for part in sorted(parts) if (states := _claims_on(directory, part))}


def announce(directory: Path, samples: Mapping[str, int]) -> None:
    """Tell whoever looks on which parts there are to be, with the samples of each."""
    (directory / CLAIMS).mkdir(parents=True, exist_ok=True)
    atomic_write_json(directory / CLAIMS / PARTS, dict(samples))


def announced(directory: Path) -> dict[str, int]:
    """What `announce` told of the artifact in `directory`; nothing where nobody works."""
    path = directory / CLAIMS / PARTS
    return dict(read_json(path)) if path.is_file() else {}


def pause() -> None:
    """Wait a moment, where there is nothing to take, before looking again."""
    time.sleep(POLL_SECONDS)


def make_once(path: Path, make: Callable[[], None]) -> None:
    """Return once `path` is there: made here, by `make()`, or by another worker."""
    claims = Claims(path.parent)
    while not path.is_file():
        claim = claims.take(path.name)
        if claim is None:
            pause()
            continue
        with claim:
            if not path.is_file():
                make()


def remove_claims(directory: Path) -> None:
    """Forget all claims on the parts of an artifact, once they are all there."""
    for path in directory.rglob(CLAIMS):
        shutil.rmtree(path, ignore_errors=True)  # another worker may be doing the same


class Claim:
    """A part that this process works on. A context manager: leaving it gives the part back to anyone.

    After `fail` it comes back as failed instead, to be tried again in a while.
    """

    def __init__(self, directory: Path, state: ClaimState, seconds: float) -> None:
        self._directory = directory
        self._state = state
        self._path = claim_path(directory, state.part, state.generation)
        self._next = claim_path(directory, state.part, state.generation + 1)
        self._seconds = seconds
        self._lock = threading.Lock()
        self._lost = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name=f"heartbeat {state.part}")
        self._thread.start()

    @property
    def token(self) -> str:
        """A name for this claim's files that no other claim has."""
        return self._path.name

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *unused: object) -> None:
        self._end("released", "")

    def progress(self, done: int, total: int, rate: float, done_per_second: float) -> None:
        """Tell how far the work is, with the next heartbeat. Raises ClaimLost where the last one saw that."""
        with self._lock:
            self._state = replace(
                self._state, done=done, total=total, rate=rate, done_per_second=done_per_second
            )
        if self._lost:
            raise ClaimLost(f"{self._state.part}: taken over by another worker")

    def is_lost(self) -> bool:
        """Whether another worker has taken the part over, or has committed the whole artifact."""
        self._lost = self._lost or self._next.exists() or not self._path.exists()
        return self._lost

    def fail(self, error: str) -> None:
        """Give the part back as failed, with the one line that says why."""
        self._end("failed", error)

    def _end(self, status: Literal["released", "failed"], error: str) -> None:
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        self._state = replace(self._state, status=status, error=error)
        self._write()

    def _beat(self) -> None:
        while not self._ended.wait(self._seconds):
            with self._lock:
                self._state = replace(self._state, beat=self._state.beat + 1)
            if not self.is_lost():
                self._write()

    def _write(self) -> None:
        # Once the artifact is committed the directory is gone, and with it all there was to say. On a full
        # disk nothing can be said: the work will tell of it, and the next heartbeat may get through.
        with contextlib.suppress(OSError):
            os.replace(_temporary(self._directory, self._state), self._path)


@dataclass(frozen=True)
class _Watched:
    """What a claim last said, when this process last looked (its own clock), and seconds without a change."""

    generation: int
    beat: int
    looked: float
    quiet: float


@dataclass
class Claims:
    """The claims on the parts of the artifact in `directory`, as one worker sees them."""

    directory: Path
    lease: float = LEASE_SECONDS
    backoff: float = BACKOFF_SECONDS
    owner: Owner = field(default_factory=Owner.here)

    def __post_init__(self) -> None:
        self._watched: dict[str, _Watched] = {}
        (self.directory / CLAIMS).mkdir(parents=True, exist_ok=True)
        self._at_start = {part: len(states) for part, states in read_claims(self.directory).items()}

    def take(self, part: str) -> Claim | None:
        """Claim `part`; None while another has it, or while it waits after a failure.

        Raises PartFailed when it has failed ATTEMPTS times, DataError where claims cannot be made.
        """
        states = _claims_on(self.directory, part)
        if states and not self._is_free(states):
            return None
        state = ClaimState(part, len(states) + 1, self.owner)
        return Claim(self.directory, state, self.lease / BEATS_A_LEASE) if self._create(state) else None

    def delay(self, failures: int) -> float:
        """Seconds to wait before trying again what has failed so often: twice as long each time."""
        return self.backoff * 2.0 ** (failures - 1)

    def _is_free(self, states: list[ClaimState]) -> bool:
        newest = states[-1]
        quiet = self._quiet_seconds(newest)
        if newest.status == "released":
            return True
        if newest.status == "working":
            return newest.owner.is_gone(self.owner) or quiet >= self.lease
        before = self._at_start.get(newest.part, 0)
        failures = sum(state.status == "failed" for state in states if state.generation > before)
        if failures >= ATTEMPTS:
            raise PartFailed(
                f"{self.directory / newest.part}: failed {failures} times, the last on {newest.owner.host} "
                f"(pid {newest.owner.pid}): {newest.error}"
            )
        if not failures:  # those of an earlier run: its user has started it again, and knows why
            return True
        return quiet >= self.delay(failures)

    def _quiet_seconds(self, state: ClaimState) -> float:
        """For how long this worker has seen nothing new of a claim."""
        now = time.monotonic()
        seen = self._watched.get(state.part)
        quiet = 0.0
        if seen is not None and (seen.generation, seen.beat) == (state.generation, state.beat):
            # Where both were suspended, by a scheduler say, the time that passed proves nothing.
            quiet = seen.quiet + min(now - seen.looked, self.lease / 4)
        self._watched[state.part] = _Watched(state.generation, state.beat, now, quiet)
        return quiet

    def _create(self, state: ClaimState) -> bool:
        """Whether this process, and no other, made the claim's file."""
        try:
            temporary = _temporary(self.directory, state)
            try:
                os.link(temporary, claim_path(self.directory, state.part, state.generation))
            finally:
                temporary.unlink()
        except (FileExistsError, FileNotFoundError):  # another was faster; the artifact has been committed
            return False
        except OSError as error:
            raise DataError(
                f"{self.directory / CLAIMS}: a claim cannot be made: {error.strerror}: choose a run_dir on a "
                "file system with hard links that can be written"
            ) from None
        return True


def _claims_on(directory: Path, part: str) -> list[ClaimState]:
    states: list[ClaimState] = []
    while True:
        path = claim_path(directory, part, len(states) + 1)
        try:
            plain = json.loads(path.read_bytes())
            states.append(ClaimState(**plain | {"owner": Owner(**plain["owner"])}))
        except FileNotFoundError:
            return states
        except (ValueError, TypeError, KeyError):
            raise DataError(
                f"{path}: damaged: end all workers of {directory}, remove {path.parent} and start them again"
            ) from None


def claim_path(directory: Path, part: str, generation: int) -> Path:
    """The file of one claim."""
    return directory / CLAIMS / f"{part}.{generation}"


def _temporary(directory: Path, state: ClaimState) -> Path:
    """The state in a file of a name of its own, whole."""
    path = directory / CLAIMS / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
    try:
        path.write_text(json.dumps(asdict(state)))
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return path


def _start_of(pid: int) -> int | None:
    """When a process began, in clock ticks after boot (Linux's proc(5)); None when it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else int(fields[18])
