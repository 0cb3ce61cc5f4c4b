"""What a check is given: where it is, and how it says what it found."""

from __future__ import annotations

import json
import math
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

Value = float | int | str | None


class LeftOut(Exception):  # noqa: N818  nothing went wrong
    """This cannot run here; the text says why, and what would."""


class CheckFailed(Exception):  # noqa: N818
    """It ran, and what it found is not right."""


@dataclass
class Part:
    """One check's share of a run.

    `toy`: sizes for a CPU. `scratch`: an empty folder, removed after the check. What is told by `figure` is
    on the disk when it returns, so that an end by any signal loses only what was not told yet.
    """

    toy: bool
    scratch: Path
    told: Path
    failures: list[str] = field(default_factory=list)

    def figure(self, name: str, **values: Value) -> None:
        """Tell one thing that was measured; units stand in the names of the values."""
        self._tell({"figure": name, **{key: _plain(value) for key, value in values.items()}})
        print(f"{name}: {values}", flush=True)

    def attempt(self, name: str, function: Callable[[], None]) -> None:
        """Run one of several measurements: where it fails the others still run, and `end` raises."""
        try:
            function()
        except LeftOut as reason:
            self.figure(name, left_out=str(reason))
        except Exception as error:  # noqa: BLE001  whatever it is, the other measurements are worth their time
            traceback.print_exc()
            self.failures.append(f"{name}: {describe(error)}")
            self.figure(name, failed=describe(error))

    def end(self) -> None:
        """Raise CheckFailed if any attempt failed."""
        if self.failures:
            raise CheckFailed("; ".join(self.failures))

    def reason(self, error: BaseException) -> None:
        """Tell why the check ended as it did."""
        self._tell({"reason": describe(error)})

    def _tell(self, record: dict[str, Value]) -> None:
        with self.told.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def describe(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, LeftOut | CheckFailed):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _plain(value: Value) -> Value:
    """JSON has no infinities."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
