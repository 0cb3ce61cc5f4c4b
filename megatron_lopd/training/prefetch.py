"""The next steps' data, made ready in a thread while the current step runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace
from types import TracebackType
from typing import Any, Generic, TypeVar

from torch import Tensor

from megatron_lopd.data.collate import MicroBatch

T = TypeVar("T")

# One step ahead hides loading that takes no longer than a step; the second, one that now and then takes two.
STEPS_AHEAD = 2


class Prefetcher(Generic[T]):
    """`load(step)` for each step of [first_step, end_step), called in order, at most `depth` steps ahead.

    A context manager: leaving it drops what is not begun and waits for what is, so no thread is left behind.
    """

    def __init__(
        self, load: Callable[[int], T], first_step: int, end_step: int, depth: int = STEPS_AHEAD
    ) -> None:
        self._load = load
        self._steps = iter(range(first_step, end_step))
        self._ahead: deque[tuple[int, Future[T]]] = deque()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        for _ in range(depth):
            self._begin_next()

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)

    def get(self, step: int) -> T:
        """What `load(step)` returned, or its error raised here. Steps are asked for in order, each once."""
        expected, result = self._ahead.popleft()
        if step != expected:
            raise ValueError(f"step {step} is asked for, and the next one is {expected}")
        self._begin_next()
        return result.result()

    def _begin_next(self) -> None:
        for step in self._steps:
            self._ahead.append((step, self._worker.submit(self._load, step)))
            return


def pinned(batch: MicroBatch) -> MicroBatch:
    """`batch` in page-locked memory, from which a GPU copies while it computes."""
    tensors: dict[str, Any] = {
        field.name: value.pin_memory()
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor)
    }
    return replace(batch, **tensors)
