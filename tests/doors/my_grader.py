"""A grader in one file: is the response an expression of the wanted value, and of an allowed length?

A recipe takes it by its import path. What it needs beside the answer, a row of the prompts' file has:

    allow_user_code: true
    prompts:
      eval: {path: eval.jsonl, extra_fields: [longest]}
    evaluate: {grader: my_grader:ExpressionGrader}
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lopd.errors import DataError
from megatron_lopd.graders import Grader, Sandbox, Verdict
from megatron_lopd.prompts import Prompt


def value(expression: str) -> str:
    """What Python makes of a model's text: to be called in a sandbox alone."""
    return str(eval(expression, {"__builtins__": {}}))


class ExpressionGrader(Grader):
    """`value` runs in a process of its own, which an endless or a huge expression ends, and not the run."""

    name = "expression"
    caption = "a Python expression of the answer's value, at most `longest` characters long"

    def __init__(self) -> None:
        self._sandbox = Sandbox(__name__, cpu_seconds=1)

    def close(self) -> None:
        self._sandbox.close()

    def require(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if prompt.answer is None or not isinstance(prompt.extra.get("longest"), int):
                raise DataError(f"prompt {prompt.id}: needs an answer, and a whole number called longest")

    def grade(self, prompt: Prompt, response: str) -> Verdict:
        if len(response) > prompt.extra["longest"]:
            return Verdict(False)
        found = self._sandbox.ask("value", response)
        return Verdict(found == prompt.answer, found, ungraded=found is None)
