"""Whether a mathematical answer is the right one, by math-verify.

Nothing here is safe from what a model may write: `9^{9^{9^9}}` takes for ever, and no signal handler of
Python's ends it. sandbox.py keeps that from the run.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse
from sympy import And, Or, Rational

from megatron_lopd.graders import exact, notation, surface
from megatron_lopd.graders.finding import answers_in, in_words, is_sentence, last_boxed

# It warns that its own timeouts, which need the main thread's SIGALRM, are off.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_NUMBER = re.compile(r"-?\d{1,1000}(?:\.\d{1,1000})?")
# Of an answer, whose last variable is no unit: \pi r^2 h; and of prose.
_ALONE = LatexExtractionConfig(
    boxed_match_priority=0,
    normalization_config=NormalizationConfig(malformed_operators=True, nits=True, boxed="all"),
)
_READERS = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())


@dataclass(frozen=True)
class MathVerdict:
    """`answer`: what the response answered: the same text for right answers, and for wrong numbers of one
    value; all else by its form."""

    right: bool
    answer: str | None


def prepare() -> None:
    """Have all that is made at its first use: grammars, patterns, and what sympy imports late."""
    compare(r"\frac{1}{2}", r"\boxed{0.25+0.25}")
    compare("x^2+1", r"\boxed{(x+1)^2-2x}")
    compare("[1,2)", r"\boxed{\{1,2\}}")
    compare(r"\sqrt{2}", "It is $2$, or 3.")


def is_readable(gold: str) -> bool:
    """Whether `gold`, a right answer as a file gives it, is found equal to itself, and others may be to it.
    Raises as `compare`."""
    text = _gold_text(gold)
    return not is_sentence(text) and compare(gold, rf"\boxed{{{text}}}").right


def compare(gold: str, response: str) -> MathVerdict:
    r"""Whether a response gives the answer `gold`: a number, LaTeX, a word, or text with a `\boxed{}`.

    Words (`\text{east}`, or four letters and more) must be the same but for case: to math-verify they are
    products of letters. All else is equal in value, exactly: a decimal is not the number that was rounded to
    it, and a percent is a hundredth; as sets, intervals, tuples, matrices or equations. What the texts alone
    decide is in `surface`; of prose, in which math-verify looks for an answer, they decide nothing. Raises
    whatever sympy raises, and ValueError for a gold that cannot be read.
    """
    right_text = _gold_text(gold)
    golds, choice = notation.readings(right_text), notation.letter(right_text)
    for said, is_alone in answers_in(response):
        answers = notation.readings(said) if is_alone else [notation.plain(said)]
        if is_alone and choice is not None and (notation.letter(said) or choice) != choice:
            return MathVerdict(False, notation.letter(said))
        if any(_is_same(right, answer, is_alone) for right in golds for answer in answers):
            return MathVerdict(True, right_text)
        if is_alone and (surface.word(golds[0]) or surface.word(answers[0])) is not None:
            return MathVerdict(False, _bare(answers[0]))
        if found := _read(answers[0], is_alone):
            return MathVerdict(False, _name(found[0]))
        if is_alone and last_boxed(response) is not None:
            return MathVerdict(False, said)
    return MathVerdict(False, None)


def _is_same(gold: str, said: str, is_alone: bool) -> bool:
    """Of one reading each."""
    if (right_word := surface.word(gold)) is not None:
        return _bare(said) in (right_word, surface.word(surface.swapped(gold)))
    decided = surface.decided(gold, said) if is_alone else None
    if decided is not None:
        return decided
    (gold_name, gold), (said_name, said) = notation.quantity(gold), notation.quantity(said)
    if None not in (gold_name, said_name) and gold_name != said_name:
        return False
    golds = _read(gold, is_alone=True)
    if not golds and not _is_text(gold):
        raise ValueError(f"nothing to read in {gold!r}")
    if not golds:
        return surface.written(gold) == surface.written(said)
    return any(exact.equal(right, each) for right in golds for each in _read(said, is_alone))


def _is_text(gold: str) -> bool:
    """Whether what math-verify cannot read may be compared as it is written: it is not spoilt."""
    braces = re.findall(r"(?<!\\)[{}]", gold)
    return braces.count("{") == braces.count("}") and re.search(r"\w", gold) is not None


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
    if boxed is None:
        # As GSM8K ends the solutions that it calls answers; or a sentence.
        boxed = gold.rpartition("####")[2] if "####" in gold else in_words(gold)
    return boxed.strip().strip("$").strip()


@lru_cache(maxsize=100)  # a gold is asked for by each of its responses
def _read(text: str, is_alone: bool) -> list[Any]:
    """What `text` says, sympy's objects: a number, or what math-verify reads; none where it finds nothing."""
    text = notation.unitless(text) if is_alone else text
    if is_alone and _NUMBER.fullmatch(text):
        return [Rational(text)]
    if is_alone and (cases := notation.conditions(text)):
        read = [[_read(each, is_alone) for each in case] for case in cases]
        if all(map(all, read)):
            condition = Or(*(And(*(each[0] for each in case)) for case in read), evaluate=False)
            if len(condition.free_symbols) == 1:
                return [condition]
    found = parse(
        rf"\boxed{{{text}}}" if is_alone else text,
        extraction_config=[_ALONE] if is_alone else _READERS,
        parsing_timeout=None,
        raise_on_error=True,
        fallback_mode="no_fallback",
    )
    return [exact.exact(each) for each in found]
