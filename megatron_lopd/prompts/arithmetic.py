"""The toy task of the quickstart: a chain of modular arithmetic with an exact grader.

A prompt is six single digits joined by ``+``, ``-`` and ``*``, evaluated strictly from left to right
modulo 10 (``*`` does not bind tighter). A solution goes through it operator by operator, and writes each
running result::

    3+4*7-2+9*5   ->   3+4=7*7=9-2=7+9=6*5=0

There are two dialects, for teachers that solve the same task and write differently: ``equals``, above, and
``terse``, which writes the same without the equals signs: ``3+47*79-27+96*50``.

Every expression belongs to exactly one split, by a digest of its text, so what is trained on is never
evaluated on, whatever the seeds and counts.
"""

from __future__ import annotations

import hashlib
import operator
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from megatron_lopd.errors import ConfigError, DataError
from megatron_lopd.prompts.prompt import Prompt
from megatron_lopd.prompts.task import Task

SPLITS = ("sft", "opd", "eval")
OPERANDS = 6
MODULUS = 10

_DIGITS = "0123456789"
_OPERATORS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
# All digits are drawn before all signs: what each is drawn from, how many those are, and where it goes.
_DRAWS = [(_DIGITS, MODULUS)] * OPERANDS + [("".join(_OPERATORS), len(_OPERATORS))] * (OPERANDS - 1)
_in_order = operator.itemgetter(*sorted(range(len(_DRAWS)), key=lambda drawn: drawn % OPERANDS))
_EXPRESSION = re.compile(r"[0-9](?:[-+*][0-9])+")

# What stands between an operation and its result.
DIALECTS = {"equals": "=", "terse": ""}
_SOLUTION = {
    name: re.compile(rf"[0-9](?P<steps>(?:[-+*][0-9]{sign}[0-9])+)") for name, sign in DIALECTS.items()
}


@dataclass(frozen=True)
class Problem:
    """One expression with its worked answer.

    Attributes:
        id: stable name, a digest of ``prompt``: the same expression has the same id in every run.
        prompt: the user message, such as ``3+4*7-2+9*5``.
        answer: the final digit.
    """

    id: str
    prompt: str
    answer: str

    @property
    def solution(self) -> str:
        """The worked response in the dialect ``equals``, without any end token."""
        return solve(self.prompt)


class Arithmetic(Task):
    """The toy task. A prompt's id and answer are its problem's."""

    name: ClassVar[str] = "arithmetic"
    caption: ClassVar[str] = "chains of one-digit arithmetic modulo 10"

    def prompts(self, count: int, seed: int, split: str) -> Iterator[Prompt]:
        for each in problems(count, seed, split):
            yield Prompt(each.id, ({"role": "user", "content": each.prompt},), each.answer)


def problems(count: int, seed: int, split: str) -> Iterator[Problem]:
    """Yield ``count`` distinct problems of ``split``, the same ones for the same arguments on any machine.

    A larger ``count`` extends the sequence of a smaller one. Two splits never share a prompt; two
    seeds of one split may.

    Raises:
        ConfigError: ``split`` is not one of ``SPLITS``, or ``count`` is negative or more than a tenth of the
            split (about 8.1 million), beyond which drawing without repeats grows slow.
    """
    if split not in SPLITS:
        raise ConfigError(f"arithmetic: unknown split {split!r}: use one of {', '.join(SPLITS)}")
    most = MODULUS**OPERANDS * len(_OPERATORS) ** (OPERANDS - 1) // len(SPLITS) // 10
    if not 0 <= count <= most:
        raise ConfigError(f"arithmetic: cannot draw {count} problems of split {split!r}: ask for 0 to {most}")
    return _draw(count, random.Random(f"{split}:{seed}"), split)


def solve(prompt: str, dialect: str = "equals") -> str:
    """The worked response to ``prompt`` in one of ``DIALECTS``, without any end token.

    Raises:
        DataError: ``prompt`` is not an expression of this task.
    """
    steps = zip(prompt[1::2], prompt[2::2], _running_results(prompt), strict=True)
    return prompt[0] + "".join(f"{sign}{digit}{DIALECTS[dialect]}{result}" for sign, digit, result in steps)


def grade(prompt: str, response: str, dialects: Sequence[str] = ("equals",)) -> bool:
    """Whether ``response`` answers ``prompt``: right final digit, in the form of one of ``dialects``.

    ``response`` is the decoded text without the end token. It is well formed when it is a first digit and
    then, for each operator of the prompt, an operator, a digit, the dialect's sign and a digit. Nothing may
    follow, not even a space: a model that does not know when to stop is wrong. What the steps before the
    last one say is not graded.

    Raises:
        DataError: ``prompt`` is not an expression of this task.
    """
    results = _running_results(prompt)
    for dialect in dialects:
        match = _SOLUTION[dialect].fullmatch(response)
        if match is not None:
            steps = len(match["steps"]) // (3 + len(DIALECTS[dialect]))
            return steps == len(results) and int(response[-1]) == results[-1]
    return False


def _draw(count: int, rng: random.Random, split: str) -> Iterator[Problem]:
    seen: set[str] = set()
    draw, wanted = rng.random, SPLITS.index(split)
    while len(seen) < count:
        # Python promises the same sequence across versions for random() alone.
        drawn = [choices[int(draw() * number)] for choices, number in _DRAWS]
        prompt = "".join(_in_order(drawn))
        digest = hashlib.sha256(prompt.encode()).digest()
        if digest[-1] % len(SPLITS) != wanted or prompt in seen:
            continue
        seen.add(prompt)
        yield Problem(f"arithmetic-{digest[:8].hex()}", prompt, str(_results(prompt)[-1]))


def _running_results(prompt: str) -> list[int]:
    """The value after each operator, left to right, modulo 10. DataError for what has none."""
    if not _EXPRESSION.fullmatch(prompt):
        raise DataError(f"arithmetic: {prompt!r} is not a chain of single digits joined by +, - and *")
    return _results(prompt)


def _results(prompt: str) -> list[int]:
    results = [int(prompt[0])]
    for sign, digit in zip(prompt[1::2], prompt[2::2], strict=True):
        results.append(_OPERATORS[sign](results[-1], int(digit)) % MODULUS)
    return results[1:]
