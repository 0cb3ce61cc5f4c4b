"""Mathematical answers: finding one in a response, and whether it is the right one (by math-verify).

Nothing here is safe from what a model may write: `9^{9^{9^9}}` takes for ever, and no signal handler of
Python's ends it. math_process.py keeps that from the run.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse
from sympy import Rational

from megatron_lopd.graders import exact, notation, surface

# It warns that its own timeouts, which need the main thread's SIGALRM, are off.
logging.getLogger("math_verify").setLevel(logging.ERROR)

# Characters of an answer, and of the end of a response where one without a \boxed{} is looked for: the search
# is by regular expressions that take far longer than the text is.
TAIL = 2000

_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_NUMBER = re.compile(r"-?\d{1,1000}(?:\.\d{1,1000})?")
_READERS = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())


@dataclass(frozen=True)
class MathVerdict:
    """`answer`: what the response answered: the same text for right answers, and for wrong numbers of one
    value; all else by its form."""

    right: bool
    answer: str | None


def last_boxed(text: str) -> str | None:
    r"""What the last closed `\boxed{...}` (or `\fbox`) holds, braces nested; None without one."""
    found = None
    open_braces: list[int | None] = []  # where the content of a box begins; None for any other brace
    for token in _TOKEN.finditer(text):
        if token[0] == "{":
            open_braces.append(None)
        elif token[0].endswith("{") and len(token[0]) > 2:
            open_braces.append(token.end())
        elif token[0] == "}" and open_braces:
            start = open_braces.pop()
            if start is not None:
                found = text[start : token.start()].strip()
    return found


def answer_in(response: str) -> str | None:
    r"""The text of a response's answer: its last `\boxed{}`, or else its end, for math-verify to search.

    `<answer>...</answer>` is a box too, where no box is in it or after it. What is thought is not answered:
    all up to the last `</think>` is left out, and a response that is still thinking, or has a box that is
    empty or longer than any answer, has none (None).
    """
    spoken = response.rpartition("</think>")[2]
    if "<think>" in spoken:
        return None
    *_, tagged = [None, *_ANSWER.finditer(spoken)]
    boxed = last_boxed(spoken if tagged is None else spoken[tagged.start(1) :])
    if boxed is None and tagged is not None:
        boxed = tagged[1].strip()
    if boxed is None:
        return spoken[-TAIL:].strip() or None
    return rf"\boxed{{{boxed}}}" if boxed and len(boxed) <= TAIL else None


def prepare() -> None:
    """Have all that is made at its first use: grammars, patterns, and what sympy imports late."""
    compare(r"\frac{1}{2}", r"\boxed{0.25+0.25}")
    compare("x^2+1", r"\boxed{(x+1)^2-2x}")
    compare("[1,2)", r"\boxed{\{1,2\}}")
    compare(r"\sqrt{2}", "It is $2$, or 3.")


def is_readable(gold: str) -> bool:
    """Whether `gold`, a right answer as a file gives it, is found equal to itself. Raises as `compare`."""
    return compare(gold, rf"\boxed{{{_gold_text(gold)}}}").right


def compare(gold: str, response: str) -> MathVerdict:
    r"""Whether a response gives the answer `gold`: a number, LaTeX, a word, or text with a `\boxed{}`.

    Words (`\text{east}`, or four letters and more) must be in a box and the same but for case: to math-verify
    they are products of letters. All else is equal in value, exactly: a decimal is not the number that was
    rounded to it, and a percent is a hundredth; as sets, intervals, tuples, matrices or equations. What the
    texts alone decide is in `notation`. Raises whatever sympy raises, and ValueError for a gold that cannot
    be read.
    """
    said, right_text = answer_in(response), _gold_text(gold)
    if said is None:
        return MathVerdict(False, None)
    boxed = last_boxed(said)
    golds = notation.readings(right_text)
    answers = [notation.plain(said)] if boxed is None else notation.readings(boxed)
    if any(_is_same(right, answer, is_boxed=boxed is not None) for right in golds for answer in answers):
        return MathVerdict(True, right_text)
    if surface.word(golds[0]) is not None:
        return MathVerdict(False, _bare(answers[0]))
    found = _read(answers[0], is_boxed=boxed is not None)
    return MathVerdict(False, _name(found[0]) if found else boxed)


def _is_same(gold: str, said: str, is_boxed: bool) -> bool:
    """Of one reading each."""
    if (right_word := surface.word(gold)) is not None:
        return _bare(said) == right_word
    decided = surface.decided(gold, said)
    if decided is not None:
        return decided
    golds = _read(gold, is_boxed=True)
    if not golds:
        raise ValueError(f"nothing to read in {gold!r}")
    return any(exact.equal(right, each) for right in golds for each in _read(said, is_boxed))


def _bare(text: str) -> str:
    return (surface.word(text) or text).strip(" .()").casefold()


def _name(thing: Any) -> str:
    if not getattr(thing, "is_number", False):
        return str(thing)
    value = thing.doit()
    is_short = isinstance(value, Rational) and abs(value.p * value.q) < 10**40
    return str(value if is_short else value.evalf(12))


def _gold_text(gold: str) -> str:
    boxed = last_boxed(gold)
    return (gold if boxed is None else boxed).strip().strip("$").strip()


@lru_cache(maxsize=100)  # a gold is asked for by each of its responses
def _read(text: str, is_boxed: bool) -> list[Any]:
    """What `text` says, sympy's objects: a number, or what math-verify reads; none where it finds nothing."""
    if is_boxed and _NUMBER.fullmatch(text):
        return [Rational(text)]
    found = parse(
        rf"\boxed{{{text}}}" if is_boxed else text,
        extraction_config=_READERS,
        parsing_timeout=None,
        raise_on_error=True,
        fallback_mode="no_fallback",
    )
    return [exact.exact(each) for each in found]
