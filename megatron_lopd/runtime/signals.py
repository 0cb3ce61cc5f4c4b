"""Stopping on request: a signal asks, the loop finishes its step and saves."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from megatron_lopd.errors import LopdError, StopRequested

# SIGTERM: a scheduler that takes the node back. SIGUSR1: SLURM's --signal, ahead of the time limit.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
AGAIN_SECONDS = 0.05  # until a stop that Python dropped is asked for again


def die_with_parent() -> None:
    """Have this process killed when the one that started it ends, however that does. Linux's prctl(2).

    Where that has ended already nothing happens: the pipe between them is closed.
    """
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


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
    with _raising(STOP_SIGNALS, lambda: StopRequested(message), StopRequested, once=True) as raised:
        try:
            yield
        except LopdError as error:
            if raised() and not isinstance(error, StopRequested):  # in an import, say, taken for a fault
                raise StopRequested(message) from error
            raise


@contextmanager
def interrupted_at_once() -> Iterator[Callable[[], bool]]:
    """While entered, Ctrl-C raises KeyboardInterrupt as ever, also where Python drops it the first time.

    Gives whether it has. Nothing changes where somebody else answers Ctrl-C.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    with _raising((signal.SIGINT,), KeyboardInterrupt, KeyboardInterrupt, once=False) as raised:
        yield raised


@contextmanager
def _raising(
    numbers: Sequence[signal.Signals],
    make: Callable[[], BaseException],
    kind: type[BaseException],
    *,
    once: bool,
) -> Iterator[Callable[[], bool]]:
    """While entered, a signal of `numbers` raises `make()`, a `kind`, wherever the main thread is.

    That may be a finalizer, of which Python reports what it raises and goes on: then it is raised again. With
    `once` further signals do nothing. Gives whether it has been raised.
    """
    raised = reporting = missed = False

    def answer(number: int, frame: FrameType | None) -> None:
        nonlocal raised, missed
        if raised and once:
            return
        if reporting:  # what is raised there goes nowhere
            missed = True
            return
        raised = True
        raise make()

    def unraisable(dropped: sys.UnraisableHookArgs) -> None:
        nonlocal raised, reporting, missed
        reporting = True
        if isinstance(dropped.exc_value, kind):  # it came while Python ran a finalizer
            raised, missed = False, True
        else:
            report(dropped)
        if missed and not asking.is_alive():
            asking.start()
        reporting = False  # with no call after it, at which Python would look for signals

    def ask_again() -> None:
        main = threading.main_thread().ident
        assert main is not None  # it runs
        while not over.wait(AGAIN_SECONDS):
            if not raised:
                signal.pthread_kill(main, numbers[0])

    over = threading.Event()
    # Another thread, for the main one is in the finalizer still.
    asking = threading.Thread(target=ask_again, daemon=True)
    report, sys.unraisablehook = sys.unraisablehook, unraisable
    before = {number: signal.signal(number, answer) for number in numbers}
    try:
        yield lambda: raised
    finally:
        try:
            over.set()
            if asking.is_alive():  # a signal that is late would end the process
                asking.join()
        finally:
            sys.unraisablehook = report
            for number, handler in before.items():
                signal.signal(number, handler)
