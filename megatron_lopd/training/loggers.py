"""Where step metrics go: metrics.jsonl, one object a step, and TensorBoard. Rank 0 only."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from megatron_lopd.artifacts.files import atomic_file

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Appends steps to `directory`; opening it drops those after `resumed_step`, so none is there twice.

    A value that is not finite becomes null: JSON has no NaN.
    """

    def __init__(self, directory: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import (
            SummaryWriter,  # `lopd status`, which reads the lines, needs no torch
        )

        directory.mkdir(parents=True, exist_ok=True)
        path = directory / METRICS_FILE
        _truncate(path, resumed_step)
        self._stream = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, metrics: Mapping[str, float]) -> None:
        """Append one step; `metrics["step"]` is its 1-based number."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._stream.write(json.dumps(finite, allow_nan=False) + "\n")
        self._stream.flush()
        for name, value in metrics.items():
            if name != "step":
                self._board.add_scalar(name, value, int(metrics["step"]))

    def sync(self) -> None:
        """Put all that was written on the disk, before a checkpoint that counts on it."""
        os.fsync(self._stream.fileno())
        self._board.flush()

    def close(self) -> None:
        """Flush and close both."""
        self._stream.close()
        self._board.close()


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
