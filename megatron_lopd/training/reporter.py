"""What a run tells the world: its metrics, by its loggers, and its progress; from rank 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from megatron_lopd.errors import LoggerError
from megatron_lopd.loggers import Loggers
from megatron_lopd.runtime.display import ProgressDisplay


class Reporter:
    """Every rank calls it alike; only rank 0 writes. Open from `begin` to the end of the `with` block."""

    def __init__(self, label: str, directory: Path, rank: int, loggers: Sequence[str]) -> None:
        self._display = ProgressDisplay(label, "step") if rank == 0 else None
        self._label, self._directory = label, directory
        self._loggers = Loggers(loggers) if rank == 0 else None

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._display is not None:
            self._display.close()
        try:
            if self._loggers is not None:
                self._loggers.close()
        except LoggerError:
            if error is None:  # else what ended the run is told
                raise

    def note(self, text: str) -> None:
        """A line to the user."""
        if self._display is not None:
            self._display.note(text)

    def begin(self, done_steps: int, total_steps: int) -> None:
        """Start after `done_steps`; metrics of later steps, from an attempt that was cut off, are dropped."""
        if self._display is not None and self._loggers is not None:
            self._display.begin(done_steps, total_steps)
            self._loggers.open(self._directory, done_steps, self._label)

    def step(self, metrics: Mapping[str, float]) -> None:
        """Record a step; `metrics` has at least step, loss, response_tokens and seconds."""
        if self._display is not None and self._loggers is not None:
            self._loggers.write(metrics)
            rate = metrics["response_tokens"] / metrics["seconds"]
            detail = f"loss {metrics['loss']:.4f}, {rate:,.0f} response tokens/s"
            self._display.update(int(metrics["step"]), detail)

    def sync(self) -> None:
        """Put the metrics on the disk."""
        if self._loggers is not None:
            self._loggers.sync()
