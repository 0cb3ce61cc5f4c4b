"""Stopping on request: a signal asks, the loop finishes its step and saves."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

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
