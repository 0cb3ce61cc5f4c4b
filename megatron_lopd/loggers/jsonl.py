"""metrics.jsonl, one JSON object a step: what report and status read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, ClassVar

from megatron_lopd.errors import DataError
from megatron_lopd.files.writing import atomic_file
from megatron_lopd.loggers.logger import Logger

METRICS_FILE = "metrics.jsonl"


class JsonLinesLogger(Logger):
    """Appends a line a step. A value that is not finite becomes null: JSON has no NaN."""

    name: ClassVar[str] = "jsonl"
    caption: ClassVar[str] = f"{METRICS_FILE}, a line a step; report and status read it"
    _stream: IO[str]

    def open(self, directory: Path, resumed_step: int, job: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / METRICS_FILE
        _truncate(path, resumed_step)
        self._stream = path.open("a", encoding="utf-8")

    def write(self, metrics: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._stream.write(json.dumps(finite, allow_nan=False) + "\n")
        self._stream.flush()

    def sync(self) -> None:
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()


def read_steps(path: Path) -> list[dict[str, Any]]:
    """What was written, step by step; a last line without its end is being written, and left out.

    Raises DataError naming the line that is damaged, or the file that is not there.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file: run the stage that trains") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: damaged ({error})") from None
    return [_step(f"{path}:{number}", line) for number, line in enumerate(lines, start=1)]


def _step(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: damaged ({error})") from None
    if not (isinstance(row, dict) and isinstance(row.get("step"), int)):
        raise DataError(f"{where}: damaged (it has no step)")
    return row


def _truncate(path: Path, step: int) -> None:
    """Keep the whole lines up to `step`. What follows a torn line was never acknowledged."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if _step(str(path), line)["step"] > step:
                break
        except DataError:
            break
        kept.append(line + "\n")
    with atomic_file(path, "w") as stream:
        stream.writelines(kept)
