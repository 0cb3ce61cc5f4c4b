"""metrics.jsonl, one JSON object a step: what report and status read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, ClassVar

from megatron_lopd.artifacts.files import atomic_file
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


def _truncate(path: Path, step: int) -> None:
    """Keep the whole lines up to `step`. What follows a torn line was never acknowledged."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except json.JSONDecodeError:
            break
        kept.append(line + "\n")
    with atomic_file(path, "w") as stream:
        stream.writelines(kept)
