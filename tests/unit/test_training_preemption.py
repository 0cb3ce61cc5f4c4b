"""A signal that asks for a stop is answered whatever Python is at."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable

import pytest

from megatron_lopd.errors import ConfigError, StopRequested
from megatron_lopd.runtime.signals import STOP_SIGNALS, interrupted_at_once, stopping_at_once


class _Finalized:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)  # Python looks for signals here, and runs the handler


class _Broken:
    def __del__(self) -> None:
        raise ValueError("in a finalizer")


class _Referred:
    """For a weak reference, whose callback Python guards as it does a finalizer."""


def _in_a_finalizer() -> None:
    _Finalized()


def _in_a_callback() -> None:
    def ask(reference: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)

    referred = _Referred()
    reference = weakref.ref(referred, ask)
    del referred
    assert reference() is None


def _in_the_loop() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


@pytest.mark.parametrize("ask", [_in_the_loop, _in_a_finalizer, _in_a_callback])
def test_a_stop_is_never_dropped(ask: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(StopRequested, match="enough"), stopping_at_once("enough"):
        _be_asked(ask)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert "Exception ignored" not in capsys.readouterr().err


@pytest.mark.parametrize("ask", [_in_the_loop, _in_a_finalizer, _in_a_callback])
def test_an_interrupt_is_never_dropped(
    ask: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C, as one that came while a weak reference went; then a second, on the way out of the first."""
    kill = os.kill
    monkeypatch.setattr(os, "kill", lambda pid, number: kill(pid, signal.SIGINT))
    monkeypatch.setattr(signal, "default_int_handler", signal.getsignal(signal.SIGINT))
    with interrupted_at_once() as interrupted:
        assert not interrupted()
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                _be_asked(ask)
            assert interrupted()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "Exception ignored" not in capsys.readouterr().err


def test_a_stop_is_not_dropped_while_one_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A launcher passes on the signal that its whole group had: the second comes right behind the first."""
    start = threading.Thread.start

    def start_after_another_signal(thread: threading.Thread) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_after_another_signal)
    with pytest.raises(StopRequested, match="enough"), stopping_at_once("enough"):
        _be_asked(_in_a_finalizer)
    assert "Exception ignored" not in capsys.readouterr().err


def test_a_stop_is_not_dropped_while_another_error_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def report(unraisable: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)

    monkeypatch.setattr(sys, "unraisablehook", report)
    with pytest.raises(StopRequested, match="enough"), stopping_at_once("enough"):
        _be_asked(_Broken)


def _be_asked(ask: Callable[[], object]) -> None:
    ask()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        time.sleep(0.001)


def test_a_stop_that_comes_as_the_work_ends_disturbs_nothing_after_it() -> None:
    """Python dropped it, and the work was over before it was asked for again."""
    with stopping_at_once("enough"):
        _in_a_finalizer()
    time.sleep(0.2)


def test_what_else_finalizers_raise_is_reported_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: reported.append(str(unraisable.exc_value)))

    with stopping_at_once("enough"):
        _Broken()
    assert reported == ["in a finalizer"]


def test_a_stop_that_is_taken_for_another_error_is_a_stop() -> None:
    """As libraries do while they import: a tokenizer then does not load."""

    def load() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except StopRequested:
            raise ConfigError("its tokenizer does not load") from None

    with pytest.raises(StopRequested, match="asked"), stopping_at_once("asked"):
        load()
    with pytest.raises(ConfigError), stopping_at_once("asked"):
        raise ConfigError("its tokenizer does not load")
