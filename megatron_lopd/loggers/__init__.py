"""Where a step's metrics go."""

from megatron_lopd.loggers.jsonl import (
    METRICS_FILE,
    TIMES_FILE,
    JsonLinesLogger,
    read_steps,
    require_every_step,
)
from megatron_lopd.loggers.logger import Logger, Loggers
from megatron_lopd.loggers.tensorboard import TensorBoardLogger
from megatron_lopd.registry import LOGGERS

__all__ = ["METRICS_FILE", "TIMES_FILE", "Logger", "Loggers", "read_steps", "require_every_step"]

LOGGERS.add(JsonLinesLogger, TensorBoardLogger)
