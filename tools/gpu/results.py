"""What a run found: one JSON line on the disk as each check ends, and a table at the end."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

BAD = ("failed", "timed out", "killed")


@dataclass(frozen=True)
class Ending:
    """How a check ended. `status`: ok, left out, or one of BAD; `figures` as `Part.figure` told them."""

    name: str
    status: str
    seconds: float
    reason: str
    log: str = ""
    figures: list[dict[str, Any]] = field(default_factory=list)


class Results:
    """`results.jsonl` of a run: {"machine": ...}, then an Ending a line, each flushed to the disk."""

    def __init__(self, path: Path) -> None:
        """Raises FileExistsError: a run does not write into another's results."""
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        self._path = path

    def add(self, record: Mapping[str, Any]) -> None:
        """Write one line. A full disk costs the line, and is said: the table still comes."""
        try:
            os.write(self._file, json.dumps(record).encode() + b"\n")
            os.fsync(self._file)
        except OSError as error:
            print(f"check.sh: {self._path} cannot be written ({error.strerror})", file=sys.stderr, flush=True)

    def add_ending(self, ending: Ending) -> None:
        self.add({**asdict(ending), "seconds": round(ending.seconds, 2)})


def table(machine: Mapping[str, str], endings: Sequence[Ending]) -> str:
    """For a person: the machine, a line a check, and its figures below it."""
    lines = [f"{name}: {text}" for name, text in machine.items()]
    lines += ["", f"{'check':<14}{'status':<11}{'seconds':>8}  "]
    for each in endings:
        lines.append(f"{each.name:<14}{each.status:<11}{each.seconds:>8.1f}  {each.reason}".rstrip())
        lines += [f"    {_shown(figure)}" for figure in each.figures]
    bad = sum(each.status in BAD for each in endings)
    done = sum(each.status == "ok" for each in endings)
    left_out = len(endings) - bad - done
    lines += ["", f"{done} ok, {bad} failed, timed out or killed, {left_out} left out"]
    return "\n".join(lines)


def _shown(figure: Mapping[str, Any]) -> str:
    values = [
        f"{key} {_number(value)}" for key, value in figure.items() if key != "figure" and value is not None
    ]
    return f"{figure['figure']}: {', '.join(values)}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"
