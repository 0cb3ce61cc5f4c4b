"""Who works on which part of an artifact: claims that outlive a dead worker and never a live one.

Workers are processes on any number of machines that share a directory; they know of each other by files.
Part `shard` is claimed by creating `.claims/shard.N`, N one more than the highest there is: exactly one
process can create it, and whoever has the highest owns the part. Its owner rewrites it at every heartbeat.

A claim is stale when its process is known to be gone, or when its heartbeat has not changed for `lease`
seconds by the clock of whoever watches: clocks of two machines are never compared. A heartbeat says that
a process is there, not that it gets on: an owner whose work has not moved for its `patience` gives the claim
up as failed, and ends, for the thread that works cannot be freed.

Claims go with the directory that holds them, once the artifact is committed. Until then it is there from
before the first claim: a worker that finds it gone knows that there is nothing left to do.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from megatron_lopd.errors import DataError, LopdError, StopRequested
from megatron_lopd.files.reading import read_json
from megatron_lopd.files.writing import TEMPORARY_PREFIX
from megatron_lopd.runtime.display import duration, say
from megatron_lopd.runtime.owner import Owner

CLAIMS = ".claims"
PARTS = "parts"  # no dot in it, as there is in every claim
# A heartbeat seen over NFS may be as old as a client keeps a directory's entries (nfs(5): acdirmax, 60 s by
# default), and is as old again when two looks meet it badly: three times that is silence.
LEASE_SECONDS = 180.0
BEATS_A_LEASE = 12
# Without a record for so long an engine counts as hung. A big model may load for half an hour, and an engine
# may give all the answers of a shard at its end.
PATIENCE_SECONDS = 2 * 60 * 60.0
POLL_SECONDS = 1.0  # between two looks at what others have claimed
# A part that failed this often fails for good. Deaths do not count: a lost node is no fault of the part.
ATTEMPTS = 3
BACKOFF_SECONDS = 5.0  # after the first failure; twice as long after each further one


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
    return {part: states for part in sorted(_newest(directory)) if (states := _claims_on(directory, part))}


def announce(directory: Path, samples: Mapping[str, int]) -> None:
    """Tell whoever looks on which parts there are to be, with the samples of each."""
    _make_directory(directory)
    with contextlib.suppress(FileNotFoundError):  # committed, this moment
        _write(directory, directory / CLAIMS / PARTS, json.dumps(dict(samples)))


def announced(directory: Path) -> dict[str, int]:
    """What `announce` told of the artifact in `directory`; nothing where nobody works."""
    path = directory / CLAIMS / PARTS
    return dict(read_json(path)) if path.is_file() else {}


def pause() -> None:
    """Wait a moment, where there is nothing to take, before looking again."""
    time.sleep(POLL_SECONDS)


def make_once(path: Path, make: Callable[[], None]) -> None:
    """Return once `path` is there: made here, by `make()`, or by another worker."""
    claims = None
    while not path.is_file():
        claims = claims or Claims(path.parent)
        claim = claims.take(path.name)
        if claim is None:
            pause()
            continue
        with claim:
            if not path.is_file():
                make()


def remove_claims(directory: Path) -> None:
    """Forget all claims on the parts of an artifact, once it is committed. Several may do so at once."""
    for place in claimed_places(directory):
        shutil.rmtree(place / CLAIMS, ignore_errors=True)


def claimed_places(directory: Path) -> list[Path]:
    """`directory` and those below it in which parts are claimed, by name."""
    # Not Path.rglob: it stumbles over what goes while it looks.
    return sorted(Path(place) for place, names, _ in os.walk(directory) if CLAIMS in names)


def end_process(message: str) -> None:
    """End this process, whose main thread is stuck, from another one: to be run again, as after a stop."""
    say(message, error=True)
    os._exit(StopRequested.exit_code)


class Claim:
    """A part that this process works on. A context manager: leaving it gives the part back to anyone.

    After `made` there is nothing to give back; after `fail` it comes back as failed, to be tried again in a
    while. `seconds` lie between two heartbeats. When `patience` seconds go by without a `progress` the claim
    fails by itself, and `hung` is called with a line that says so.
    """

    def __init__(
        self, directory: Path, state: ClaimState, seconds: float, patience: float, hung: Callable[[str], None]
    ) -> None:
        self._directory = directory
        self._state = state
        self._path = claim_path(directory, state.part, state.generation)
        self._next = claim_path(directory, state.part, state.generation + 1)
        self._seconds, self._patience, self._hung = seconds, patience, hung
        self._lock = threading.Lock()
        self._lost = self._is_made = self._has_moved = False
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
            self._has_moved = True
        if self._lost:
            raise ClaimLost(f"{self._state.part}: taken over by another worker")

    def is_lost(self) -> bool:
        """Whether another worker has taken the part over, or has committed the whole artifact."""
        self._lost = self._lost or self._next.exists() or not self._path.exists()
        return self._lost

    def made(self) -> None:
        """The part is there: nobody will ask for it again, nor read what was said of making it."""
        self._is_made = True

    def fail(self, error: str) -> None:
        """Give the part back as failed, with the one line that says why."""
        self._end("failed", error)

    def _end(self, status: Literal["released", "failed"], error: str) -> None:
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        self._say(status, error)

    def _beat(self) -> None:
        quiet, before = 0.0, time.monotonic()
        while not self._ended.wait(self._seconds):
            now = time.monotonic()
            with self._lock:
                # While the process is suspended nothing can move, and that is no fault of the work's.
                quiet = 0.0 if self._has_moved else quiet + min(now - before, 2 * self._seconds)
                self._has_moved = False
                self._state = replace(self._state, beat=self._state.beat + 1)
            before = now
            if self.is_lost():
                continue
            if quiet >= self._patience:
                self._give_up(duration(quiet))
                return
            self._write()

    def _give_up(self, quiet: str) -> None:
        self._lost = True
        self._ended.set()
        self._say("failed", f"no progress in {quiet}: it hangs")
        self._hung(
            f"lopd: {self._directory / self._state.part}: no progress in {quiet}: its engine "
            "hangs: the shard is left to the other workers, and this one ends"
        )

    def _say(self, status: Literal["released", "failed"], error: str) -> None:
        """The last word. A part made at the first try leaves none: thousands would be in the way."""
        if self._is_made and self._state.generation == 1:
            with contextlib.suppress(OSError):
                self._path.unlink()
            return
        with self._lock:
            self._state = replace(self._state, status=status, error=error)
        self._write()

    def _write(self) -> None:
        # Once the artifact is committed the directory is gone, and with it all there was to say. On a full
        # disk nothing can be said: the work will tell of it, and the next heartbeat may get through.
        with contextlib.suppress(OSError):
            _write(self._directory, self._path, _text(self._state))


@dataclass(frozen=True)
class _Watched:
    """What a claim last said, when this process last looked (its own clock), and seconds without a change."""

    generation: int
    beat: int
    looked: float
    quiet: float


@dataclass
class Claims:
    """The claims on the parts of the artifact in `directory`, as one worker sees them.

    `patience`: seconds without progress after which a claim taken here is given up, and `hung` is called.
    """

    directory: Path
    lease: float = LEASE_SECONDS
    backoff: float = BACKOFF_SECONDS
    owner: Owner = field(default_factory=Owner.here)
    patience: float = math.inf
    hung: Callable[[str], None] = end_process

    def __post_init__(self) -> None:
        self._watched: dict[str, _Watched] = {}
        _make_directory(self.directory)
        self._at_start = _newest(self.directory)

    def is_over(self) -> bool:
        """Whether the artifact is committed, which takes its claims away."""
        return not (self.directory / CLAIMS).is_dir()

    def take(self, part: str) -> Claim | None:
        """Claim `part`; None while another has it, or while it waits after a failure.

        Raises PartFailed when it has failed ATTEMPTS times, DataError where claims cannot be made.
        """
        states = _claims_on(self.directory, part)
        if states and not self._is_free(states):
            return None
        state = ClaimState(part, len(states) + 1, self.owner)
        if not self._create(state):
            return None
        return Claim(self.directory, state, self.lease / BEATS_A_LEASE, self.patience, self.hung)

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
            temporary = _temporary(self.directory, _text(state))
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


def _newest(directory: Path) -> dict[str, int]:
    """The highest generation of claim on each part, from the files' names alone."""
    newest: dict[str, int] = {}
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(directory / CLAIMS):
            part, _, generation = name.rpartition(".")
            if generation.isdecimal() and not name.startswith(TEMPORARY_PREFIX):
                newest[part] = max(newest.get(part, 0), int(generation))
    return newest


def _make_directory(directory: Path) -> None:
    # "It is there already", and then it is not, when the artifact is committed this moment.
    with contextlib.suppress(FileExistsError):
        (directory / CLAIMS).mkdir(parents=True, exist_ok=True)


def _text(state: ClaimState) -> str:
    return json.dumps(vars(state) | {"owner": vars(state.owner)})


def _write(directory: Path, path: Path, text: str) -> None:
    """Put `text` into a file of the claims' directory, whole, whatever is there. Raises OSError."""
    os.replace(_temporary(directory, text), path)


def _temporary(directory: Path, text: str) -> Path:
    """The text in a file of a name of its own, whole."""
    path = directory / CLAIMS / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
    try:
        path.write_text(text)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return path
