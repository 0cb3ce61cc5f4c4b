"""The toy task's exact graders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from megatron_lopd.errors import DataError
from megatron_lopd.graders.grader import Grader, Verdict
from megatron_lopd.prompts import arithmetic
from megatron_lopd.prompts.prompt import Prompt


class ArithmeticGrader(Grader):
    """Computes the answer from the prompt; `dialects` are the ways to write it that count."""

    name: ClassVar[str] = "arithmetic"
    caption: ClassVar[str] = "the built-in task's answers, exactly"
    dialects: ClassVar[tuple[str, ...]] = ("equals",)

    def require(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            try:
                arithmetic.solve(_question(prompt))
            except DataError as error:
                raise DataError(f"{prompt.described}: {error}") from None

    def grade(self, prompt: Prompt, response: str) -> Verdict:
        return Verdict(arithmetic.grade(_question(prompt), response, self.dialects))


class DialectsGrader(ArithmeticGrader):
    """As ArithmeticGrader, in any way to write it."""

    name: ClassVar[str] = "arithmetic_dialects"
    caption: ClassVar[str] = "the built-in task's answers, in either way to write them"
    dialects: ClassVar[tuple[str, ...]] = tuple(arithmetic.DIALECTS)


def _question(prompt: Prompt) -> str:
    return str(prompt.messages[-1]["content"])
