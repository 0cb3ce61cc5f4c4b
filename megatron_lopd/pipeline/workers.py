"""A stage that any number of processes, on any number of machines, make together: each is a worker.

They share the stage's directory and nothing else. Each claims parts (a shard of samples), writes them and
publishes them; the commit is claimed like a part. A worker ends well only once the stage is committed, so
whatever waits for one of them may go on.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_lopd.config import EngineConfig
from megatron_lopd.data.arrow_file import require_plan
from megatron_lopd.data.records import Rollout, Score
from megatron_lopd.engines import open_engine
from megatron_lopd.engines.protocol import Engine
from megatron_lopd.errors import EngineDied, LopdError, StopRequested, Unreadable
from megatron_lopd.files.reading import require_regular
from megatron_lopd.files.writing import TEMPORARY_PREFIX, publish
from megatron_lopd.runtime.claim_files import CLAIMS, announce
from megatron_lopd.runtime.claims import (
    ATTEMPTS,
    LEASE_SECONDS,
    Claim,
    ClaimLost,
    Claims,
    PartFailed,
    pause,
)
from megatron_lopd.runtime.display import Pace, ProgressDisplay

# For one response, where no engine is at work.
GRADING_SECONDS = 2 * 60 * 60.0
R = TypeVar("R", Rollout, Score)
# Passes records on, and counts them.
Count = Callable[[Iterable[R]], Iterator[R]]


@dataclass(frozen=True)
class Part:
    """A shard to be made at `path`: `write(engine, path, count)` writes it somewhere, its records counted."""

    path: Path
    samples: int
    write: Callable[[Engine, Path, Count[Any]], None]


@dataclass(frozen=True)
class Derived:
    """What is made at `path` from the file `source` alone, once that is there, without an engine.

    `write(path, tick)` writes it somewhere, and calls `tick()` now and then to show that it gets on. What
    only the commit needs may lie in the directory of the claims, and goes with it.
    """

    path: Path
    source: Path
    write: Callable[[Path, Callable[[], None]], None]


@dataclass(frozen=True)
class Work:
    """Parts that one model makes, all in one directory, and what is derived of them.

    `label` is what progress is shown under; `plan`, what its shards carry. Without an engine it has no Part.
    """

    label: str
    engine: EngineConfig | None
    model_dir: Path
    parts: Sequence[Part | Derived]
    plan: str = ""

    @property
    def directory(self) -> Path:
        """Where the parts are, beside the directory of the claims on them."""
        place = self.parts[0].path.parent
        return place.parent if place.name == CLAIMS else place


def make_parts(works: Sequence[Work]) -> None:
    """Return once every part is there, made here or by others; those already there are kept.

    Or once the artifact is committed, which takes away what only the commit needed.

    Where an engine is killed or a shared file cannot be read, the part is tried again after a while, here or
    elsewhere; raises PartFailed when that has happened to it too often, or here to ATTEMPTS parts with none
    made between, Unreadable where its claims cannot be read for a while, and any other error at once.
    """
    with closing(_Worker(works)) as worker:
        while not worker.is_done():
            if not worker.make_some():
                if worker.is_over():
                    return
                pause()


class _Share:
    """One work as this worker sees it. It looks at all parts once, and then at those it comes by."""

    def __init__(self, work: Work) -> None:
        self.work = work
        there = {place: _names_in(place) for place in {part.path.parent for part in work.parts}}
        self.left = [part for part in work.parts if part.path.name not in there[part.path.parent]]
        for part in work.parts:
            if isinstance(part, Part) and part.path.name in there[part.path.parent]:
                require_plan(part.path, work.plan)
        self.total = sum(map(_samples, work.parts))
        self.done = self.total - sum(map(_samples, self.left))
        self.claims: Claims

    def join(self) -> None:
        """Tell which shards there are to be, and take part in the claims on them."""
        shards = {part.path.name: part.samples for part in self.work.parts if isinstance(part, Part)}
        announce(self.work.directory, shards)
        engine = self.work.engine
        patience = GRADING_SECONDS if engine is None else engine.patience_seconds
        # The lease too: an engine's own process is given up first, which says what it was.
        self.claims = Claims(self.work.directory, patience=patience + LEASE_SECONDS)
        begin = random.randrange(len(self.left) + 1)  # all from the front, they would meet at every part
        self.left = self.left[begin:] + self.left[:begin]

    def is_there(self, part: Part | Derived) -> bool:
        """Whether somebody has published it, which counts it. DataError for what is there and no file."""
        with suppress(OSError):  # whoever claims it looks again
            if _is_published(part.path):
                self.done += _samples(part)
                return True
        return False

    def look_again(self, passed: Sequence[Part | Derived]) -> list[Part | Derived]:
        """Those of the parts that nobody has published yet."""
        return [part for part in passed if not self.is_there(part)]


class _Worker:
    """This process's part in the work."""

    def __init__(self, works: Sequence[Work]) -> None:
        self._shares = [_Share(work) for work in works]
        for share in () if self.is_done() else self._shares:
            share.join()
        self._open: tuple[EngineConfig, Path, Engine] | None = None
        self._progress: _Progress | None = None
        self._failed: set[Path] = set()  # parts, since one was made here

    def is_done(self) -> bool:
        """Whether every part is there, as far as this worker has looked."""
        return not any(share.left for share in self._shares)

    def is_over(self) -> bool:
        """Whether the artifact has been committed."""
        return any(share.claims.is_over() for share in self._shares)

    def make_some(self) -> bool:
        """Go through what is left, and make what can be claimed. Whether there was any."""
        found = [self._make_some_of(share) for share in self._shares]
        return any(found)

    def _make_some_of(self, share: _Share) -> bool:
        found = False
        passed: list[Part | Derived] = []  # what others are at work on: as many as they are
        for part in share.left:
            if share.is_there(part):
                continue
            if _can_be_made(part):
                claim = share.claims.take(part.path.name)
                if claim is not None:
                    with claim:
                        found = True
                        passed = share.look_again(passed)
                        self._make(share, part, claim)
            passed.append(part)
        share.left = share.look_again(passed)
        return found

    def close(self) -> None:
        """End the display and the engine."""
        self._close_display()
        self._close_engine()

    def _close_display(self) -> None:
        if self._progress is not None:
            self._progress.close()

    def _close_engine(self) -> None:
        if self._open is not None:
            self._open[2].close()
        self._open = None

    def _make(self, share: _Share, part: Part | Derived, claim: Claim) -> None:
        private = part.path.with_name(f"{TEMPORARY_PREFIX}{claim.token}")
        progress = self._shown(share)
        try:
            try:
                if _is_published(part.path):  # between the look and the claim
                    return
                self._write(share, part, private, progress, claim)
                if not claim.is_lost():
                    publish(private, part.path)
                    claim.made()
            finally:
                private.unlink(missing_ok=True)  # whoever has committed has cleared up, and will not again
            self._failed.clear()
        except ClaimLost as lost:
            progress.note(f"{lost}: dropped here")
        except (EngineDied, Unreadable, OSError) as error:
            self._close_engine()
            if claim.is_lost():
                progress.note(f"{part.path.name}: {error}: left to who took it over")
                return
            claim.fail(str(error))
            self._failed.add(part.path)
            if len(self._failed) == ATTEMPTS:  # no fault of a part: it would go through all of them
                raise PartFailed(
                    f"{part.path}: the last of {ATTEMPTS} that failed here with none made between: {error}"
                ) from error
            progress.note(f"{part.path.name}: {error}: to be tried again")
            time.sleep(share.claims.delay(len(self._failed)))
        except StopRequested:
            raise
        except LopdError:
            if not claim.is_lost():  # else what was in the way is what the others have done
                raise

    def _write(
        self, share: _Share, part: Part | Derived, private: Path, progress: _Progress, claim: Claim
    ) -> None:
        if isinstance(part, Part):
            samples, engine = part.samples, self._engine(share.work)
            if claim.is_lost():  # while the engine was loaded
                raise ClaimLost(f"{part.path.name}: taken over by another worker")
            part.write(engine, private, lambda records: progress.count(records, samples, claim))
        else:
            os.stat(part.source)  # OSError where that could not be seen before
            part.write(private, lambda: claim.progress(0, 0, 0.0, 0.0))

    def _engine(self, work: Work) -> Engine:
        assert work.engine is not None  # it has a Part
        if self._open is None or self._open[:2] != (work.engine, work.model_dir):
            self._close_engine()  # before the next is loaded: both may not fit
            self._open = work.engine, work.model_dir, open_engine(work.engine, str(work.model_dir))
        return self._open[2]

    def _shown(self, share: _Share) -> _Progress:
        """The display, at what this worker knows all of them to have published."""
        label = share.work.label
        if self._progress is None or self._progress.label != label:
            self._close_display()
            self._progress = _Progress(label, share.done, share.total)
        self._progress.done = share.done
        return self._progress


class _Progress:
    """Counts records as they pass into a shard, for this console and for the claim's readers."""

    def __init__(self, label: str, done: int, total: int) -> None:
        self.label = label
        self.done = done
        self._made = self._tokens = 0
        self._began, self._pace = time.monotonic(), Pace()  # of this worker's own
        self._display = ProgressDisplay(label, "sample")
        self._display.begin(done, total)

    def count(self, records: Iterable[R], samples: int, claim: Claim) -> Iterator[R]:
        for number, record in enumerate(records, start=1):
            self.done += 1
            self._tokens += 0 if record.log_probs is None else len(record.log_probs)
            self._made += 1
            self._pace.count(self._made)
            seconds = time.monotonic() - self._began
            rate = self._tokens / seconds
            self._display.update(self.done, f"{rate:,.0f} response tokens/s")
            claim.progress(number, samples, rate, self._pace.per_second or 0.0)
            yield record

    def note(self, text: str) -> None:
        self._display.note(text)

    def close(self) -> None:
        self._display.close()


def _samples(part: Part | Derived) -> int:
    return part.samples if isinstance(part, Part) else 0


def _can_be_made(part: Part | Derived) -> bool:
    """Whether what it is made from is there, or cannot be seen, which then is a failure to make it."""
    with suppress(OSError):
        return isinstance(part, Part) or part.source.is_file()
    return True


def _names_in(directory: Path) -> set[str]:
    try:
        return set(os.listdir(directory))
    except FileNotFoundError:
        return set()


def _is_published(path: Path) -> bool:
    """Whether a part has been made. DataError for a link, a directory or the like in its place."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return False
    require_regular(path, mode)
    return True
