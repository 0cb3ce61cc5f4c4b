"""A copy of a process with several threads may begin with a lock that nobody in it will give back."""

from __future__ import annotations

import threading

import pytest

from megatron_lopd.runtime import bounded


def test_a_copy_that_waits_for_ever_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "LOOK_SECONDS", 0.1)
    held = threading.Lock()

    def twice(number: int) -> int:
        with held:
            return 2 * number

    held.acquire()
    threading.Timer(0.05, held.release).start()  # here, and not in the copy that there is by then
    assert list(bounded.bounded(twice, range(5), cpu_seconds=5)) == [0, 2, 4, 6, 8]


def test_the_last_copy_is_given_all_the_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(bounded, "PATIENCE_SECONDS", 0.3)
    held = threading.Lock()
    with held:
        (failed,) = bounded.bounded(lambda number: held.acquire(), [1], cpu_seconds=5)
    assert failed == bounded.Failed("it has taken over 0 seconds")
