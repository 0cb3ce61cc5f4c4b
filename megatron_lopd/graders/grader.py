"""What a grader is."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

from megatron_lopd.prompts.prompt import Prompt


@dataclass(frozen=True)
class Verdict:
    """What a grader says of a response.

    `answer`: equal for responses that give the same answer, so that they can vote; None where there is none,
    or the grader does not extract one. `ungraded`: the comparison failed, and the response counts as wrong;
    `late`: because its time was up, so that a faster machine might have graded it.
    """

    right: bool
    answer: str | None = None
    ungraded: bool = False
    late: bool = field(default=False, compare=False)


class Grader(ABC):
    """Says whether a response is right. A context manager: leaving it ends whatever process it has.

    A grader of its own overrides `grade`, and `grade_all`, `require` and `close` where it has need of them.
    `name` is what a recipe calls it, `caption` what it checks, in a line. It is made without arguments.
    """

    name: ClassVar[str]
    caption: ClassVar[str]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self) -> None:  # noqa: B027 - most have nothing to end
        """End whatever it has started."""

    def require(self, prompts: Sequence[Prompt]) -> None:  # noqa: B027 - some can grade any
        """Raise DataError naming the first prompt whose responses it could not grade, and why."""

    @abstractmethod
    def grade(self, prompt: Prompt, response: str) -> Verdict:
        """Of a response that came to its end, decoded, without its end token.

        What a model thinks before it answers stands between `<think>` and `</think>`, whatever its own marks.
        """

    def grade_all(self, asked: Sequence[tuple[Prompt, str]], seconds: float) -> Iterator[Verdict]:
        """The verdict on each of them, in order, within `seconds` together: those that are left are late.

        Here the clock's, looked at before each. A grader that can end one in its midst does better to.
        """
        end = time.monotonic() + seconds
        for prompt, response in asked:
            is_late = time.monotonic() > end
            yield Verdict(False, ungraded=True, late=True) if is_late else self.grade(prompt, response)
