"""metrics.jsonl and times.jsonl, one JSON object a step each: what report and status read.

What a clock gives is in the second: the first is the same for the same run, and part of its artifact.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, ClassVar

from megatron_lopd.artifacts.committed import CommittedFile
from megatron_lopd.errors import DataError
from megatron_lopd.files.reading import is_there, parse_json, read_bytes
from megatron_lopd.files.writing import atomic_file, open_to_append
from megatron_lopd.loggers.logger import Logger

METRICS_FILE, TIMES_FILE = "metrics.jsonl", "times.jsonl"
LIMIT = 1 << 28  # bytes of a file, all in memory when it is read: some half a million steps
# Of a step's metrics, those that differ from run to run.
TIMES = frozenset({"seconds", "data_wait_s", "rollout_s", "teacher_s", "tokens_per_s", "mfu"})


class JsonLinesLogger(Logger):
    """Appends a line a step. A value that is not finite becomes null: JSON has no NaN."""

    name: ClassVar[str] = "jsonl"
    caption: ClassVar[str] = (
        f"{METRICS_FILE}, a line a step, and {TIMES_FILE}, how long it took; report and status read them"
    )
    _streams: dict[str, IO[str]]

    def open(self, directory: Path, resumed_step: int, job: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._streams = {}
        for name in (METRICS_FILE, TIMES_FILE):
            _truncate(directory / name, resumed_step)
            self._streams[name] = open_to_append(directory / name)

    def write(self, metrics: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        times = {name: value for name, value in finite.items() if name in TIMES or name == "step"}
        measured = {name: value for name, value in finite.items() if name not in TIMES}
        for row, stream in zip((measured, times), self._streams.values(), strict=True):
            stream.write(json.dumps(row, allow_nan=False) + "\n")
            stream.flush()

    def sync(self) -> None:
        for stream in self._streams.values():
            os.fsync(stream.fileno())

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()


def read_steps(file: Path | CommittedFile) -> list[dict[str, Any]]:
    """What was written, step by step; a last line without its end is being written, and left out.

    Raises DataError naming the line that is damaged, or the file that is not there.
    """
    if isinstance(file, CommittedFile):
        with file.open() as stream:
            return list(_steps(file.path, stream.read()))
    if not is_there(file):
        raise DataError(f"{file}: no such file: run the stage that trains")
    return list(_steps(file, read_bytes(file, limit=LIMIT, follow_links=False)))


def require_every_step(directory: Path, steps: int) -> None:
    """Raise DataError unless metrics.jsonl in `directory` has a line for each of the steps 1 to `steps`."""
    path = directory / METRICS_FILE
    found = [row["step"] for row in read_steps(path)]
    if found != list(range(1, steps + 1)):
        raise DataError(f"{path}: damaged: it has {len(set(found))} of the {steps} steps, or not in order")


def _steps(path: Path, data: bytes) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        where = f"{path}:{number}"
        try:
            row = parse_json(line.decode(), where)
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: damaged ({error})") from None
        if not (isinstance(row, dict) and type(row.get("step")) is int):
            raise DataError(f"{where}: damaged (it has no step)")
        if strange := [name for name, value in row.items() if not _is_metric(value)]:
            raise DataError(f"{where}: damaged ({strange[0][:40]!r} is no number)")
        yield row


def _is_metric(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) < 1e300)


def _truncate(path: Path, step: int) -> None:
    """Keep the whole lines up to `step`. What follows a torn line was never acknowledged."""
    if not is_there(path):
        return
    kept = 0
    data = read_bytes(path, limit=LIMIT, follow_links=False)
    try:
        for row in _steps(path, data):
            if row["step"] > step:
                break
            kept += 1
    except DataError:  # the lines before it stay
        pass
    with atomic_file(path) as stream:
        stream.writelines(line + b"\n" for line in data.split(b"\n")[:kept])
