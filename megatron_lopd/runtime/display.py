"""Where a run is: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

PLAIN_LINE_SECONDS = 5.0


class ProgressDisplay:
    """How many of how many `unit`s are done, with the rate and the time left, on standard error."""

    def __init__(self, label: str, unit: str) -> None:
        self._label, self._unit = label, unit
        self._bar: tqdm[Any] | None = None
        self._first = self._total = 0
        self._began = time.monotonic()
        self._last_line = self._began

    def begin(self, done: int, total: int) -> None:
        """Start counting: `done` of `total` are done."""
        self._first, self._total = done, total
        self._began = self._last_line = time.monotonic()
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, desc=self._label, unit=self._unit)

    def update(self, done: int, detail: str) -> None:
        """Report that `done` are done; `detail` goes along (a loss, a rate)."""
        if self._bar is not None:
            self._bar.set_postfix_str(detail, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last_line < PLAIN_LINE_SECONDS and done < self._total:
            return
        self._last_line = now
        left = (now - self._began) / (done - self._first) * (self._total - done)
        self.note(f"{self._unit} {done}/{self._total}  {detail}  {duration(left)} left")

    def note(self, text: str) -> None:
        """Print a line beside the progress."""
        from tqdm import tqdm

        tqdm.write(f"{self._label}: {text}", file=sys.stderr)
        sys.stderr.flush()

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """`75` -> `1m15s`, `4000` -> `1h06m`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
