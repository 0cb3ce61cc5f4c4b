"""TensorBoard's event files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from megatron_lopd.loggers.logger import Logger

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardLogger(Logger):
    """A scalar a metric, below the stage's directory."""

    name: ClassVar[str] = "tensorboard"
    caption: ClassVar[str] = "TensorBoard's event files, in tensorboard/"
    _board: SummaryWriter

    def open(self, directory: Path, resumed_step: int, job: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if name != "step":
                self._board.add_scalar(name, value, int(metrics["step"]))

    def sync(self) -> None:
        self._board.flush()

    def close(self) -> None:
        self._board.close()
