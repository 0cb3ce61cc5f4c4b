"""A stage that any number of processes, on any number of machines, make together: each is a worker.

They share the stage's directory and nothing else. Each claims parts (a shard of samples), writes them and
publishes them; the commit is claimed like a part. A worker ends well only once the stage is committed, so
whatever waits for one of them may go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_lopd.artifacts.files import TEMPORARY_PREFIX, publish
from megatron_lopd.config import EngineConfig
from megatron_lopd.data.records import Rollout, Score
from megatron_lopd.engines import open_engine
from megatron_lopd.engines.protocol import Engine
from megatron_lopd.errors import EngineDied, LopdError, StopRequested
from megatron_lopd.runtime.claims import ATTEMPTS, Claim, ClaimLost, Claims, PartFailed, announce, pause
from megatron_lopd.runtime.display import ProgressDisplay

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
class Work:
    """Parts that one model makes, all in one directory. `label` is what progress is shown under."""

    label: str
    engine: EngineConfig
    model_dir: Path
    parts: Sequence[Part]


def make_parts(works: Sequence[Work]) -> None:
    """Return once every part is there, made here or by others; those already there are kept.

    Where an engine is killed or a shared file cannot be read, the part is tried again after a while, here or
    elsewhere; raises PartFailed when that has happened to it too often, or here to ATTEMPTS parts with none
    made between, and any other error at once.
    """
    with closing(_Worker(works)) as worker:
        while worker.missing():
            if not worker.make_some():
                pause()


class _Worker:
    """This process's share of the work."""

    def __init__(self, works: Sequence[Work]) -> None:
        self._works = works
        self._claims: dict[Path, Claims] = {}
        for work in works if self.missing() else ():
            directory = work.parts[0].path.parent
            announce(directory, {part.path.name: part.samples for part in work.parts})
            self._claims[directory] = Claims(directory)
        self._open: tuple[EngineConfig, Path, Engine] | None = None
        self._progress: _Progress | None = None
        self._failed: set[Path] = set()  # parts, since one was made here

    def missing(self) -> list[tuple[Work, Part]]:
        """The parts that nobody has published, in order."""
        return [(work, part) for work in self._works for part in work.parts if not part.path.is_file()]

    def make_some(self) -> bool:
        """Make each missing part that can be claimed. Whether there was one."""
        found = False
        for work, part in self.missing():
            if part.path.is_file():  # published by another while this one was at an earlier part
                continue
            claim = self._claims[part.path.parent].take(part.path.name)
            if claim is not None:
                with claim:
                    found = True
                    self._make(work, part, claim)
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

    def _make(self, work: Work, part: Part, claim: Claim) -> None:
        if part.path.is_file():  # published between the look and the claim
            return
        private = part.path.with_name(f"{TEMPORARY_PREFIX}{claim.token}")
        progress = self._shown(work)
        try:
            part.write(self._engine(work), private, lambda records: progress.count(records, part, claim))
            if not claim.is_lost():
                publish(private, part.path)
            self._failed.clear()
        except ClaimLost as lost:
            progress.note(f"{lost}: dropped here")
        except (EngineDied, OSError) as error:
            self._close_engine()
            claim.fail(str(error))
            self._failed.add(part.path)
            if len(self._failed) == ATTEMPTS:  # no fault of a part: it would go through all of them
                raise PartFailed(
                    f"{part.path}: the last of {ATTEMPTS} that failed here with none made between: {error}"
                ) from error
            progress.note(f"{part.path.name}: {error}: to be tried again")
            time.sleep(self._claims[part.path.parent].delay(len(self._failed)))
        except StopRequested:
            raise
        except LopdError:
            if not claim.is_lost():  # else what was in the way is what the others have done
                raise

    def _engine(self, work: Work) -> Engine:
        if self._open is None or self._open[:2] != (work.engine, work.model_dir):
            self._close_engine()  # before the next is loaded: both may not fit
            self._open = work.engine, work.model_dir, open_engine(work.engine, str(work.model_dir))
        return self._open[2]

    def _shown(self, work: Work) -> _Progress:
        """The display, at what all workers have published of `work`."""
        done = sum(part.samples for part in work.parts if part.path.is_file())
        if self._progress is None or self._progress.label != work.label:
            self._close_display()
            self._progress = _Progress(work.label, done, sum(part.samples for part in work.parts))
        self._progress.done = done
        return self._progress


class _Progress:
    """Counts records as they pass into a shard, for this console and for the claim's readers."""

    def __init__(self, label: str, done: int, total: int) -> None:
        self.label = label
        self.done = done
        self._made = self._tokens = 0
        self._began = time.monotonic()
        self._display = ProgressDisplay(label, "sample")
        self._display.begin(done, total)

    def count(self, records: Iterable[R], part: Part, claim: Claim) -> Iterator[R]:
        for number, record in enumerate(records, start=1):
            self.done += 1
            self._tokens += 0 if record.log_probs is None else len(record.log_probs)
            self._made += 1
            seconds = time.monotonic() - self._began
            rate = self._tokens / seconds
            self._display.update(self.done, f"{rate:,.0f} tokens/s")
            claim.progress(number, part.samples, rate, self._made / seconds)
            yield record

    def note(self, text: str) -> None:
        self._display.note(text)

    def close(self) -> None:
        self._display.close()
