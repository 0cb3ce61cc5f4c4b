"""Mathematical answers, compared by what they mean, in processes that may die of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, ClassVar

from megatron_lopd.errors import DataError
from megatron_lopd.graders.grader import Grader, Verdict
from megatron_lopd.graders.sandbox import CPU_SECONDS, Outcome, Ration, Sandbox
from megatron_lopd.prompts.prompt import Prompt

# Of processes at once, each of which may take a sandbox's memory; and of calls that make another worth its
# start, which takes about a second.
MOST, WORTH_ONE = 4, 256


class MathGrader(Grader):
    """`graders.math` in sandboxes, as many at once as there are cores and work for."""

    name: ClassVar[str] = "math"
    caption: ClassVar[str] = "mathematical answers by what they mean (math-verify, the last \\boxed{} first)"

    def __init__(self) -> None:
        self._sandbox = Sandbox("megatron_lopd.graders.math")
        cores = len(os.sched_getaffinity(0))
        more = [Sandbox("megatron_lopd.graders.math") for _ in range(min(cores, MOST) - 1)]
        self._sandboxes = [self._sandbox, *more]

    def close(self) -> None:
        for sandbox in self._sandboxes:
            sandbox.close()

    def require(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if prompt.answer is None:
                raise DataError(
                    f"{prompt.described}: has no answer to grade by: add one, or name its field with "
                    "answer_field, with dots where it is in another: reward_model.ground_truth"
                )
        golds = {prompt.answer: prompt.described for prompt in reversed(prompts)}
        found = self._calls("is_readable", [(gold,) for gold in golds], CPU_SECONDS * len(golds))
        for (gold, name), outcome in zip(golds.items(), found, strict=True):
            if outcome.value is not True:
                raise DataError(
                    f"{name}: its answer {(gold or '')[:80]!r} is not one that math-verify can "
                    "read: correct it, or drop the prompt"
                )

    def grade(self, prompt: Prompt, response: str) -> Verdict:
        return _verdict(self._sandbox.call(CPU_SECONDS, "compare", prompt.answer, response))

    def grade_all(self, asked: Sequence[tuple[Prompt, str]], seconds: float) -> Iterator[Verdict]:
        arguments = [(prompt.answer, response) for prompt, response in asked]
        return map(_verdict, self._calls("compare", arguments, seconds))

    def _calls(
        self, function: str, arguments: Sequence[tuple[Any, ...]], seconds: float
    ) -> Iterator[Outcome]:
        """What came of each call, in order, within `seconds` of processor time together."""
        ration = Ration(seconds, len(arguments))
        free: SimpleQueue[Sandbox] = SimpleQueue()
        for sandbox in self._sandboxes[: 1 + len(arguments) // WORTH_ONE]:
            free.put(sandbox)

        def call(each: tuple[Any, ...]) -> Outcome:
            sandbox = free.get()
            try:
                return ration.spend(lambda allowed: sandbox.call(allowed, function, *each))
            finally:
                free.put(sandbox)

        pool = ThreadPoolExecutor(free.qsize())
        try:
            yield from pool.map(call, arguments)
        finally:
            pool.shutdown(cancel_futures=True)


def _verdict(outcome: Outcome) -> Verdict:
    if outcome.value is None:
        return Verdict(False, ungraded=True, late=outcome.late)
    return Verdict(outcome.value.right, outcome.value.answer)
