"""A logger in one file: the losses as a table for a spreadsheet.

A recipe takes it by its import path, beside those that it wants too:

    allow_user_code: true
    train:
      loggers: [jsonl, my_logger:CsvLogger]
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import IO

from megatron_lopd.loggers import Logger


class CsvLogger(Logger):
    """losses.csv in the stage's directory: step and loss, a line each."""

    name = "csv"
    caption = "losses.csv, for a spreadsheet"
    _stream: IO[str]

    def open(self, directory: Path, resumed_step: int, job: str) -> None:
        path = directory / "losses.csv"
        lines = path.read_text().splitlines()[1:] if path.exists() else []
        kept = [line for line in lines if int(line.split(",")[0]) <= resumed_step]
        path.write_text("\n".join([f"step,loss of {job}", *kept, ""]))
        self._stream = path.open("a")

    def write(self, metrics: Mapping[str, float]) -> None:
        self._stream.write(f"{metrics['step']:g},{metrics['loss']!r}\n")

    def sync(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()
