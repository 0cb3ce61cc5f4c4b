"""Stopping on request: a signal asks, the loop finishes its step and saves."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from megatron_lopd.errors import StopRequested

# SIGTERM: a scheduler that takes the node back. SIGUSR1: SLURM's --signal, ahead of the time limit.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """While entered, STOP_SIGNALS set `requested` instead of ending the process. Main thread only."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._request) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


@contextmanager
def stopping_at_once(message: str) -> Iterator[None]:
    """While entered, the first of STOP_SIGNALS raises StopRequested wherever the main thread is.

    For work that has nothing to save: what it has in hand is dropped and made again. Further signals do
    not disturb the way out.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise StopRequested(message)

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
