"""What writes the metrics, by name."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lopd.registry import LOGGERS


@dataclass(frozen=True)
class LoggerKind:
    name: str
    caption: str


LOGGERS.add(
    LoggerKind("jsonl", "metrics.jsonl, a line a step"),
    LoggerKind("tensorboard", "TensorBoard's event files"),
)
