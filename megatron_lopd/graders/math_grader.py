"""Mathematical answers, compared by what they mean, in a process that may die of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from megatron_lopd.errors import DataError
from megatron_lopd.graders.grader import Grader, Verdict
from megatron_lopd.graders.sandbox import Sandbox
from megatron_lopd.prompts.prompt import Prompt


class MathGrader(Grader):
    """`graders.math` in a sandbox."""

    name: ClassVar[str] = "math"
    caption: ClassVar[str] = "mathematical answers by what they mean (math-verify, the last \\boxed{} first)"

    def __init__(self) -> None:
        self._sandbox = Sandbox("megatron_lopd.graders.math")

    def close(self) -> None:
        self._sandbox.close()

    def require(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if prompt.answer is None:
                raise DataError(
                    f"prompt {prompt.id}: has no answer to grade by: add one, or name its field with "
                    "answer_field"
                )
            if self._sandbox.ask("is_readable", prompt.answer) is not True:
                raise DataError(
                    f"prompt {prompt.id}: its answer {prompt.answer[:80]!r} is not one that math-verify can "
                    "read: correct it, or drop the prompt"
                )

    def grade(self, prompt: Prompt, response: str) -> Verdict:
        assert prompt.answer is not None  # `require` says so first
        found = self._sandbox.ask("compare", prompt.answer, response)
        if found is None:
            return Verdict(False, ungraded=True)
        return Verdict(found.right, found.answer)
