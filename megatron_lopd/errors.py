"""The errors a user can meet, each with the process exit code it ends in.

Exit codes: 0 done; 1 failed; 2 bad usage or configuration; 3 refused (lineage or guard);
75 stopped on request with a checkpoint saved: run the same command again.
"""

from __future__ import annotations

from pathlib import Path

_LONGEST_REASON = 300  # characters


def reason_of(error: BaseException) -> str:
    """What a library's error says, in a line."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= _LONGEST_REASON else f"{said[:_LONGEST_REASON]}..."


class LopdError(Exception):
    """Base of every error raised on purpose. The message is one line: what, where, what to do."""

    exit_code = 1
    said = False  # whether another process has told the user


class ConfigError(LopdError):
    """The recipe or the command line is wrong, or asks for what this machine cannot do."""

    exit_code = 2


class NotInstalled(ConfigError):  # noqa: N818 - what is so, as EngineDied
    """The recipe needs a program that this machine has not; the one it is to run on may have it."""


class DataError(LopdError):
    """An input or an artifact is missing, malformed or damaged."""


class Unreadable(DataError):  # noqa: N818 - what happened, as StopRequested
    """The system refuses to read a file that is there; another try, or another machine, may go through."""


class LineageError(LopdError):
    """Two things that must come from the same model, tokenizer or artifact do not."""

    exit_code = 3


class CheckpointError(LopdError):
    """A training checkpoint is missing, damaged or of another model."""


class EngineError(LopdError):
    """A generation or scoring engine cannot run the model it was given."""


class EngineDied(EngineError):  # noqa: N818 - what happened, as StopRequested
    """An engine's process was killed from outside; another start may well go through."""


class OutOfMemory(LopdError):  # noqa: N818 - what happened, as StopRequested
    """Training does not fit a GPU or this machine; another start of the same would end alike."""


class NumericsError(LopdError):
    """A guard stopped the run: numbers that must agree do not, or are not finite."""

    exit_code = 3


class DriftError(NumericsError):
    """The student has moved away from what the cached scores can judge.

    `last_good` is the newest checkpoint from before, or the starting model where none was saved.
    """

    def __init__(self, message: str, last_good: Path) -> None:
        super().__init__(message)
        self.last_good = last_good


class LoggerError(LopdError):
    """A logger cannot write a step's metrics."""


class StopRequested(LopdError):  # noqa: N818 - a wish, not an error
    """The run was asked to stop; its checkpoint is saved and the same command resumes it."""

    exit_code = 75


class RefreshDue(StopRequested):
    """Training has used up its rollouts; its checkpoint is saved, and `lopd refresh` makes the next ones."""


# What torch's allocators, cuBLAS and vLLM's own say of a GPU or a machine that is full.
_FULL = ("out of memory", "can't allocate memory", "cublas_status_alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a GPU or of the machine, whichever library says so."""
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in _FULL)
