"""Stopping on request: a signal asks, the loop finishes its step and saves."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from megatron_lopd.errors import StopRequested

# SIGTERM: a scheduler that takes the node back. SIGUSR1: SLURM's --signal, ahead of the time limit.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
AGAIN_SECONDS = 0.05  # until a stop that Python dropped is asked for again


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

    def dropped(unraisable: sys.UnraisableHookArgs) -> None:
        if not isinstance(unraisable.exc_value, StopRequested):
            report(unraisable)
            return
        # The signal came while Python ran a finalizer, and what is raised in one goes nowhere. Ask again,
        # from another thread: this one is in the finalizer still.
        for each in STOP_SIGNALS:
            signal.signal(each, stop)
        main, number = threading.main_thread().ident, STOP_SIGNALS[0]
        assert main is not None  # it runs
        again = threading.Timer(AGAIN_SECONDS, signal.pthread_kill, (main, number))
        again.daemon = True
        timers.append(again)
        again.start()

    timers: list[threading.Timer] = []
    report, sys.unraisablehook = sys.unraisablehook, dropped
    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        try:
            for timer in timers:  # one that is late would end the process
                timer.cancel()
                timer.join()
        finally:
            sys.unraisablehook = report
            for number, handler in before.items():
                signal.signal(number, handler)
