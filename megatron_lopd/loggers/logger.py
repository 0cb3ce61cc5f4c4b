"""What a logger is, and several as one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import ClassVar

from megatron_lopd.errors import LoggerError, LopdError
from megatron_lopd.registry import LOGGERS


class Logger(ABC):
    """Where a step's metrics go; in rank 0 alone.

    A logger of its own overrides `open` and `write`, and `sync` and `close` where it has need of them. `name`
    is what a recipe calls it, `caption` where it writes, in a line. It is made without arguments. What it
    raises ends the run, as one line that names it: one that can do without its service catches that itself.
    """

    name: ClassVar[str]
    caption: ClassVar[str]

    @abstractmethod
    def open(self, directory: Path, resumed_step: int, job: str) -> None:
        """Begin to write after `resumed_step` steps, 0 for a new run.

        Steps after it, from an attempt that was cut off, come again: drop them. `directory` is the stage's,
        `job` its name ("sft", "train").
        """

    @abstractmethod
    def write(self, metrics: Mapping[str, float]) -> None:
        """Take one step; `metrics["step"]` is its 1-based number. A value may be infinite or NaN."""

    def sync(self) -> None:  # noqa: B027 - not all hold anything back
        """Put all that was written in safety, before a checkpoint that counts on it."""

    def close(self) -> None:  # noqa: B027
        """Flush and close."""


class Loggers:
    """Those that a recipe names, as one. Raises LoggerError naming the one that failed."""

    def __init__(self, names: Sequence[str]) -> None:
        self._loggers: list[Logger] = [LOGGERS[name]() for name in names]
        self._opened = ExitStack()

    def open(self, directory: Path, resumed_step: int, job: str) -> None:
        """As Logger.open."""
        for logger in self._loggers:
            with _told_by(logger):
                logger.open(directory, resumed_step, job)
            self._opened.callback(_close, logger)

    def write(self, metrics: Mapping[str, float]) -> None:
        """As Logger.write."""
        for logger in self._loggers:
            with _told_by(logger):
                logger.write(metrics)

    def sync(self) -> None:
        """As Logger.sync."""
        for logger in self._loggers:
            with _told_by(logger):
                logger.sync()

    def close(self) -> None:
        """Close those that were opened, each also where another's closing fails."""
        self._opened.close()


def _close(logger: Logger) -> None:
    with _told_by(logger):
        logger.close()


@contextmanager
def _told_by(logger: Logger) -> Iterator[None]:
    try:
        yield
    except LopdError:
        raise
    except Exception as error:  # a service's library may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise LoggerError(
            f"the logger {logger.name} cannot write: {reason}: mend that, or leave it out of the stage's "
            "loggers, and run the same command again"
        ) from error
