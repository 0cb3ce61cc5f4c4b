from __future__ import annotations

import threading
import time

import pytest

from megatron_lopd.training.prefetch import Prefetcher


class Loads:
    """Counts loads, and holds each until it is let go."""

    def __init__(self, fails_at: int = -1) -> None:
        self.begun: list[int] = []
        self.fails_at = fails_at
        self.allowed = threading.Semaphore(0)

    def __call__(self, step: int) -> str:
        self.begun.append(step)
        assert self.allowed.acquire(timeout=10)
        if step == self.fails_at:
            raise RuntimeError(f"step {step} cannot be read")
        return f"data of {step}"


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_steps_come_in_order_and_never_more_than_depth_ahead() -> None:
    loads = Loads()
    loads.allowed.release(100)
    with Prefetcher(loads, 3, 9, depth=2) as batches:
        for step in range(3, 9):
            time.sleep(0.05)  # for one that ran too far ahead to show
            assert loads.begun == list(range(3, len(loads.begun) + 3))
            assert len(loads.begun) <= step - 3 + 2
            assert batches.get(step) == f"data of {step}"
        assert loads.begun == list(range(3, 9))
    assert not prefetch_threads()


def test_the_next_steps_are_ready_before_they_are_asked_for() -> None:
    ready = threading.Event()

    def load(step: int) -> int:
        if step == 1:
            ready.set()
        return step

    with Prefetcher(load, 0, 5, depth=2):
        assert ready.wait(timeout=10)


def test_an_error_is_raised_in_the_step_it_belongs_to() -> None:
    loads = Loads(fails_at=2)
    loads.allowed.release(10)
    with Prefetcher(loads, 0, 6) as batches:
        assert [batches.get(0), batches.get(1)] == ["data of 0", "data of 1"]
        with pytest.raises(RuntimeError, match="step 2 cannot be read"):
            batches.get(2)
    assert not prefetch_threads()


def test_leaving_early_drops_what_is_not_begun_and_leaves_no_thread() -> None:
    loads = Loads()

    def stop() -> None:
        with Prefetcher(loads, 0, 100, depth=4) as batches:
            loads.allowed.release()
            batches.get(0)
            # The one that has begun ends while it is waited for, half a second after the rest was dropped.
            threading.Timer(0.5, loads.allowed.release, [100]).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert len(loads.begun) <= 2
    assert not prefetch_threads()


def test_steps_out_of_order_are_a_mistake() -> None:
    with Prefetcher(str, 0, 5) as batches, pytest.raises(ValueError, match=r"step 1 is asked for.* is 0"):
        batches.get(1)
