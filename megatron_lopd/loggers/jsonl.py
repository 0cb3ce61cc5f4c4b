"""metrics.jsonl, one JSON object a step: what report and status read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, ClassVar

from megatron_lopd.errors import DataError
from megatron_lopd.files.reading import parse_json, read_lines
from megatron_lopd.files.writing import atomic_file, open_to_append
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
        self._stream = open_to_append(path)

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
    if not os.path.lexists(path):
        raise DataError(f"{path}: no such file: run the stage that trains")
    return [
        _step(f"{path}:{number}", line)
        for number, line in read_lines(path, follow_links=False)
        if line.endswith("\n")
    ]


def _step(where: str, line: str) -> dict[str, Any]:
    row = parse_json(line, where)
    if not (isinstance(row, dict) and isinstance(row.get("step"), int)):
        raise DataError(f"{where}: damaged (it has no step)")
    return row


def _truncate(path: Path, step: int) -> None:
    """Keep the whole lines up to `step`. What follows a torn line was never acknowledged."""
    if not os.path.lexists(path):
        return
    kept = []
    with suppress(DataError):
        for number, line in read_lines(path, follow_links=False):
            if not line.endswith("\n") or _step(f"{path}:{number}", line)["step"] > step:
                break
            kept.append(line)
    with atomic_file(path, "w") as stream:
        stream.writelines(kept)
