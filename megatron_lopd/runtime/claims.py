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
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from megatron_lopd.errors import DataError, LopdError, StopRequested, Unreadable
from megatron_lopd.files.reading import require_regular
from megatron_lopd.runtime.claim_files import (
    CLAIMS,
    ClaimState,
    claim_path,
    claimed_places,
    claims_on,
    create_claim,
    make_claims_directory,
    newest,
    rewrite,
    text_of,
)
from megatron_lopd.runtime.display import duration, say
from megatron_lopd.runtime.owner import Owner

# A heartbeat seen over NFS may be as old as a client keeps a directory's entries (nfs(5): acdirmax, 60 s by
# default), and is as old again when two looks meet it badly: three times that is silence.
LEASE_SECONDS = 180.0
BEATS_A_LEASE = 12
POLL_SECONDS = 1.0  # between two looks at what others have claimed
# A part that failed this often fails for good. Deaths do not count: a lost node is no fault of the part.
ATTEMPTS = 3
BACKOFF_SECONDS = 5.0  # after the first failure; twice as long after each further one


class ClaimLost(LopdError):  # noqa: N818 - what happened, as StopRequested
    """Another worker took the part over while this one was not heard of: what it made is dropped."""


class PartFailed(LopdError):  # noqa: N818
    """A part, or a worker at one part after another, has failed as often as it may."""


def pause() -> None:
    """Wait a moment, where there is nothing to take, before looking again."""
    time.sleep(POLL_SECONDS)


def make_once(path: Path, make: Callable[[], None]) -> None:
    """Return once `path` is there: made here, by `make()`, or by another worker.

    DataError for what is no file in its place.
    """
    claims = None
    while not path.is_file():
        claims = claims or Claims(path.parent)
        claim = claims.take(path.name)
        if claim is None:
            pause()
            continue
        with claim:
            if not _is_listed(path):
                make()
            elif not path.is_file():
                require_regular(path, os.lstat(path).st_mode)


def commit_once(path: Path, commit: Callable[[], None], clear: Callable[[], None]) -> None:
    """Return once `path`, which says that all is made, is there, and nothing of the workers' is left.

    By `commit()` here and then `clear()`, which may remove all claims and whatever has a temporary name: one
    worker does both. The others stay until it has, or do what it did not come to.
    """
    claims = None
    while not path.is_file() or claimed_places(path.parent):
        if claims is None or (claims.is_over() and (path.is_file() or not _is_listed(path))):
            claims = Claims(path.parent)
        claim = claims.take(path.name)
        if claim is None:
            pause()
            continue
        with claim:
            try:
                if not _is_listed(path):
                    commit()
            except DataError:
                if not _is_listed(path):  # else what was in the way is what another has done, or cleared
                    raise
            claim.let_go()  # what it said last would come after the clearing
            clear()
            return


def _is_listed(path: Path) -> bool:
    """Whether `path` is there for certain: of a name a client of NFS may have kept for a minute that it is
    not; a directory's list it looks at anew."""
    try:
        return path.name in os.listdir(path.parent)
    except FileNotFoundError:
        return False


def hold(directory: Path, part: str) -> Claim:
    """Claim `part` for this process alone, for as long as it works, where no lock of the system's can be had.

    Waits for as long as a claim of a process that may be dead needs to show no sign of life. Raises LopdError
    where one that lives has it. When it is lost all the same, to one that took this process for dead, the
    process ends.
    """

    def lost() -> None:
        end_process(
            f"lopd: {directory}: this process was not heard of for {duration(LEASE_SECONDS)}, and another "
            "has taken its work over: it ends"
        )

    claims = Claims(directory, lost=lost)
    heard: set[tuple[int, int]] = set()
    while (claim := claims.take(part)) is None:
        states = claims_on(directory, part)
        heard |= {(states[-1].generation, states[-1].beat)} if states else set()
        if len(heard) > 1 or (states and states[-1].owner.is_here(claims.owner)):
            raise LopdError(f"{directory}: another lopd is at work here: wait for it, or end it")
        pause()
    return claim


def end_process(message: str) -> None:
    """End this process, whose main thread is stuck, from another one: to be run again, as after a stop."""
    say(message, error=True)
    os._exit(StopRequested.exit_code)


class Claim:
    """A part that this process works on. A context manager: leaving it gives the part back to anyone.

    After `made` there is nothing to give back; after `fail` it comes back as failed, to be tried again in a
    while. `seconds` lie between two heartbeats. When `patience` seconds go by without a `progress` the claim
    fails by itself, and `hung` is called with a line that says so; `lost` is called when a heartbeat finds
    that another has the part.
    """

    def __init__(
        self,
        directory: Path,
        state: ClaimState,
        seconds: float,
        patience: float,
        hung: Callable[[str], None],
        lost: Callable[[], None],
    ) -> None:
        self._directory = directory
        self._state = state
        self._path = claim_path(directory, state.part, state.generation)
        self._next = claim_path(directory, state.part, state.generation + 1)
        self._seconds, self._patience, self._hung, self._on_loss = seconds, patience, hung, lost
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
        with contextlib.suppress(OSError):  # nothing can be seen now
            self._lost = self._lost or _is_there(self._next) or not _is_there(self._path)
        return self._lost

    def made(self) -> None:
        """The part is there: nobody will ask for it again, nor read what was said of making it."""
        self._is_made = True

    def fail(self, error: str) -> None:
        """Give the part back as failed, with the one line that says why."""
        self._end("failed", error)

    def let_go(self) -> None:
        """End the heartbeat, without a last word."""
        self._ended.set()
        self._thread.join()

    def _end(self, status: Literal["released", "failed"], error: str) -> None:
        if self._ended.is_set():
            return
        self.let_go()
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
                self._on_loss()
                return
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
            rewrite(self._directory, self._path, text_of(self._state))


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

    `patience`: seconds without progress after which a claim taken here is given up, and `hung` is called;
    `lost` when a heartbeat finds one taken over.
    """

    directory: Path
    lease: float = LEASE_SECONDS
    backoff: float = BACKOFF_SECONDS
    owner: Owner = field(default_factory=Owner.here)
    patience: float = math.inf
    hung: Callable[[str], None] = end_process
    lost: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self._watched: dict[str, _Watched] = {}
        self._unread: dict[str, tuple[int, float]] = {}  # looks that failed in a row, and when the last did
        make_claims_directory(self.directory)
        self._at_start = newest(self.directory)

    def is_over(self) -> bool:
        """Whether the artifact is committed, which takes its claims away."""
        with contextlib.suppress(OSError):  # nothing can be seen now
            return not (self.directory / CLAIMS).is_dir()
        return False

    def take(self, part: str) -> Claim | None:
        """Claim `part`; None while another has it, or it waits after a failure, or to be looked at again.

        Raises PartFailed when it has failed ATTEMPTS times, Unreadable when that many looks at its claims
        have, and DataError where claims cannot be made.
        """
        states = self._look(part)
        if states is None:
            return None
        if states and not self._is_free(states):
            return None
        state = ClaimState(part, len(states) + 1, self.owner)
        if not self._create(state):
            return None
        beat = self.lease / BEATS_A_LEASE
        return Claim(self.directory, state, beat, self.patience, self.hung, self.lost)

    def delay(self, failures: int) -> float:
        """Seconds to wait before trying again what has failed so often: twice as long each time."""
        return self.backoff * 2.0 ** (failures - 1)

    def _look(self, part: str) -> list[ClaimState] | None:
        """The claims on a part, oldest first; None where they cannot be read now, which may pass."""
        failed, last = self._unread.get(part, (0, 0.0))
        if failed and time.monotonic() < last + self.delay(failed):
            return None
        try:
            states = claims_on(self.directory, part)
        except Unreadable:
            if failed + 1 == ATTEMPTS:
                raise
            self._unread[part] = failed + 1, time.monotonic()
            return None
        self._unread.pop(part, None)
        return states

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
        return create_claim(self.directory, state)


def _is_there(path: Path) -> bool:
    """As `os.path.lexists`, but raises OSError where it cannot be seen."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True
