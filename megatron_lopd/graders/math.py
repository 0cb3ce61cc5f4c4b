"""Mathematical answers: finding one in a response, and whether it is the right one (by math-verify).

Nothing here is safe from what a model may write: `9^{9^{9^9}}` takes for ever, and no signal handler of
Python's ends it. math_process.py keeps that from the run.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

# It warns that its own timeouts, which need the main thread's SIGALRM, are off.
logging.getLogger("math_verify").setLevel(logging.ERROR)

# Without a \boxed{}, an answer is looked for in the end of the response alone, in characters: the search
# is by regular expressions that take far longer than the text is.
TAIL = 2000

_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_WORDS = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox)\s*\{\s*([^{}\\$]*?)\s*\}|([A-Za-z][A-Za-z ]{3,})")
_THOUSANDS = re.compile(r"\d{1,3}(?:(?:\\[,!;: ]| )\d{3})+(?:\.\d+)?")
_SPACE = re.compile(r"\\[,!;: ]| ")
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

    What is thought is not answered: all up to the last `</think>` is left out, and a response that is still
    thinking, or has an empty box, has no answer (None).
    """
    spoken = response.rpartition("</think>")[2]
    if "<think>" in spoken:
        return None
    boxed = last_boxed(spoken)
    if boxed is None:
        return spoken[-TAIL:].strip() or None
    return rf"\boxed{{{boxed}}}" if boxed else None


def is_readable(gold: str) -> bool:
    """Whether `gold`, a right answer as a file gives it, is found equal to itself. Raises as `compare`."""
    return compare(gold, rf"\boxed{{{_gold_text(gold)}}}").right


def compare(gold: str, response: str) -> MathVerdict:
    r"""Whether a response gives the answer `gold`: a number, LaTeX, a word, or text with a `\boxed{}`.

    Words (`\text{east}`, or four letters and more) must be in a box and the same but for case: to math-verify
    they are products of letters. All else is its judgement: equal in value, as sets, intervals, tuples or
    equations; units, percent and degree signs do not count. Raises whatever it raises.
    """
    said = answer_in(response)
    if said is None:
        return MathVerdict(False, None)
    boxed, right_text = last_boxed(said), _gold_text(gold)
    word = _word(right_text)
    if word is not None:
        spoken = said if boxed is None else _word(boxed) or boxed
        spoken = spoken.strip(" .()").casefold()
        return MathVerdict(spoken == word, spoken)
    found = _expressions(said if boxed is None else rf"\boxed{{{_plain(boxed)}}}")
    if not found:
        return MathVerdict(False, boxed)
    right = verify(
        _expressions(rf"\boxed{{{_plain(right_text)}}}"), found, timeout_seconds=None, raise_on_error=True
    )
    return MathVerdict(right, right_text if right else _name(found[0]))


def _name(expression: Any) -> str:
    return str(expression.evalf(12)) if getattr(expression, "is_number", False) else str(expression)


def _gold_text(gold: str) -> str:
    boxed = last_boxed(gold)
    return (gold if boxed is None else boxed).strip().strip("$").strip()


def _word(text: str) -> str | None:
    match = _WORDS.fullmatch(text)
    return None if match is None else (match[1] or match[2] or "").strip(" .()").casefold() or None


def _plain(text: str) -> str:
    """Thousands set apart by spaces, which math-verify reads as a product, put together."""
    return _SPACE.sub("", text) if _THOUSANDS.fullmatch(text) else text


def _expressions(text: str) -> list[Any]:
    """What math-verify reads in `text`, sympy's objects; none where it finds nothing."""
    found: list[Any] = parse(
        text,
        extraction_config=_READERS,
        parsing_timeout=None,
        raise_on_error=True,
        fallback_mode="no_fallback",
    )
    return found
