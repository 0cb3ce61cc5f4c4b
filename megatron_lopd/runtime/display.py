"""Where a run is: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

PLAIN_LINE_SECONDS = 5.0
BURST_SECONDS = 1.0
TELLING_SECONDS = 5.0  # what the time left is told from at least
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"  # tqdm's own rest counts what was loaded, too


class Pace:
    """How fast things come, from when they came: nothing until that says something.

    The first to come has all that was loaded behind it, and an engine gives a whole batch at once: so time
    runs from the first arrival on, and what has come counts up to the last arrival that a later one has
    ended. Arrivals closer than BURST_SECONDS are one.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._arrivals: list[tuple[float, int]] = []  # when, and how many there were before
        self._done = 0

    def start(self, done: int) -> None:
        """`done` were there before."""
        self._done = done

    def count(self, done: int) -> None:
        """`done` in all have come by now."""
        now = self._clock()
        if not self._arrivals or now - self._arrivals[-1][0] >= BURST_SECONDS:
            self._arrivals.append((now, self._done))
            del self._arrivals[2:-2]  # the first two say where it began, the last two where it is
        self._done = done

    @property
    def per_second(self) -> float | None:
        """None until enough has come to tell."""
        if len(self._arrivals) < 3:
            return None
        (began, _), (_, first) = self._arrivals[:2]
        (ended, _), (_, last) = self._arrivals[-2:]
        if ended - began < TELLING_SECONDS or last <= first:
            return None
        return (last - first) / (ended - began)


class ProgressDisplay:
    """How many of how many `unit`s are done, with the rate and the time left, on standard error."""

    def __init__(self, label: str, unit: str) -> None:
        self._label, self._unit = printable(label), unit
        self._bar: tqdm[Any] | None = None
        self._total = 0
        self._pace = Pace()
        self._last_line = time.monotonic()

    def begin(self, done: int, total: int) -> None:
        """Start counting: `done` of `total` are done."""
        self._total = total
        self._pace, self._last_line = Pace(), time.monotonic()
        self._pace.start(done)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=done,
                desc=self._label,
                unit=self._unit,
                bar_format=BAR,
                dynamic_ncols=True,
            )

    def update(self, done: int, detail: str) -> None:
        """Report that `done` are done; `detail` goes along (a loss, a rate)."""
        self._pace.count(done)
        rate = self._pace.per_second
        left = "" if rate is None else f"  {duration((self._total - done) / rate)} left"
        if self._bar is not None:
            self._bar.set_postfix_str(detail + left, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last_line < PLAIN_LINE_SECONDS and done < self._total:
            return
        self._last_line = now
        self.note(f"{self._unit} {done}/{self._total}  {detail}{left}")

    def note(self, text: str) -> None:
        """Print a line beside the progress."""
        from tqdm import tqdm

        tqdm.write(f"{self._label}: {printable(text)}", file=sys.stderr)
        sys.stderr.flush()

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()


def printable(text: str) -> str:
    """A foreign text as a terminal or a log may be given it: in one line, and nothing but text.

    Control characters (ANSI sequences begin with one, a new line is one), what turns the direction of
    writing, what has no width, and halves of characters are written as Python writes them: \\x1b, \\u202e.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_printable_character, text))


def shortened(text: str, head: int = 1_200, tail: int = 600) -> str:
    """A text of any length as one of at most `head` + `tail` characters and a mark.

    By default an error's: it begins with where, may quote what it is about, and ends with what to do.
    """
    if len(text) <= head + tail:
        return text
    return f"{text[:head]} [... {len(text) - head - tail:,} characters ...] {text[-tail:]}"


def say(text: str, *, error: bool = False) -> None:
    """Print a line, whatever is in it, on standard output or on standard error."""
    print(printable(text), file=sys.stderr if error else sys.stdout, flush=True)


def _printable_character(character: str) -> str:
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return character.encode("unicode_escape").decode()
    return character


def duration(seconds: float) -> str:
    """`75` -> `1m15s`, `4000` -> `1h06m`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
