"""What a grader is, and the graders by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from megatron_lopd.errors import DataError
from megatron_lopd.graders.math_process import MathProcess
from megatron_lopd.prompts import arithmetic
from megatron_lopd.prompts.prompt import Prompt
from megatron_lopd.registry import GRADERS


@dataclass(frozen=True)
class Verdict:
    """What a grader says of a response.

    `answer`: equal for responses that give the same answer, so that they can vote; None where there is none,
    or the grader does not extract one. `ungraded`: the comparison failed, and the response counts as wrong.
    """

    right: bool
    answer: str | None = None
    ungraded: bool = False


class Grader(Protocol):
    """A context manager: leaving it ends whatever process it has."""

    def __enter__(self) -> Grader: ...

    def __exit__(self, *unused: object) -> None: ...

    def require(self, prompts: Sequence[Prompt]) -> None:
        """Raise DataError naming the first prompt whose responses it could not grade, and why."""

    def grade(self, prompt: Prompt, response: str) -> Verdict:
        """Of a response that came to its end, decoded, without its end token."""


@dataclass(frozen=True)
class GraderKind:
    """A grader by name. `open` starts it."""

    name: str
    caption: str
    open: Callable[[], Grader]


class ArithmeticGrader(AbstractContextManager["ArithmeticGrader"]):
    """The toy task's exact grader: it computes the answer from the prompt."""

    def __init__(self, dialects: Sequence[str]) -> None:
        self._dialects = dialects

    def __exit__(self, *unused: object) -> None:
        pass

    def require(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            arithmetic.solve(_question(prompt))

    def grade(self, prompt: Prompt, response: str) -> Verdict:
        return Verdict(arithmetic.grade(_question(prompt), response, self._dialects))


class MathGrader(AbstractContextManager["MathGrader"]):
    """Mathematical answers, compared by what they mean, in a process that may die of them."""

    def __init__(self) -> None:
        self._process = MathProcess()

    def __exit__(self, *unused: object) -> None:
        self._process.close()

    def require(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if prompt.answer is None:
                raise DataError(
                    f"prompt {prompt.id}: has no answer to grade by: add one, or name its field with "
                    "answer_field"
                )
            if not self._process.is_readable(prompt.answer):
                raise DataError(
                    f"prompt {prompt.id}: its answer {prompt.answer[:80]!r} is not one that math-verify can "
                    "read: correct it, or drop the prompt"
                )

    def grade(self, prompt: Prompt, response: str) -> Verdict:
        assert prompt.answer is not None  # `require` says so first
        found = self._process.compare(prompt.answer, response)
        if found is None:
            return Verdict(False, ungraded=True)
        return Verdict(found.right, found.answer)


KINDS = (
    GraderKind(
        "math", "mathematical answers by what they mean (math-verify, the last \\boxed{} first)", MathGrader
    ),
    GraderKind("arithmetic", "the built-in task's answers, exactly", lambda: ArithmeticGrader(("equals",))),
    GraderKind(
        "arithmetic_dialects",
        "the built-in task's answers, in either way to write them",
        lambda: ArithmeticGrader(tuple(arithmetic.DIALECTS)),
    ),
)


def open_grader(name: str) -> Grader:
    """The grader of that name. ConfigError when there is none."""
    kind: GraderKind = GRADERS[name]
    return kind.open()


def _question(prompt: Prompt) -> str:
    return str(prompt.messages[-1]["content"])
