r"""Where a response says its answer: a \boxed{}, or else what stands after "the answer is", or all of it."""

from __future__ import annotations

import re
from typing import NamedTuple

from megatron_lopd.graders.surface import turns

# Characters of an answer, and of the end of a response where one without a \boxed{} is looked for: the search
# is by regular expressions that take far longer than the text is.
TAIL = 2000

_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)

# What an answer without a box follows.
_MARK = re.compile(
    r"####|\b(?i:answer)s?\b(?:[^.\n$=:\d]{0,40}?\s(?:is|are)\b)?\*{0,2}\s{0,3}"
    r"(?:[:\uff1a=]|(?<=is)|(?<=are)|\n)\s{0,3}\*{0,2}"
    r"|(?:答案[是为]?|故选)[:\uff1a]?"
)
_FORMULA = r"(?:\$\$[^$]{1,400}\$\$|\$[^$\n]{1,400}\$(?!\d)|\\\([^\n]{1,400}?\\\)|\\\[.{1,400}?\\\])"
_FORMULAS = re.compile(rf"{_FORMULA}(?:\s{{0,3}}(?:,|,? ?\b(?:and|or)\b)\s{{0,3}}{_FORMULA})*", re.DOTALL)
_BRACKETS = re.compile(r"\$+|\\[()[\]]")
_END = re.compile(
    r"\n|[.!。;\uff1b](?=\s|\*|$)|,\s(?!(?:and|or)\b)(?=[A-Za-z]{2})"
    r"|\s\(?(?:because|since|as|so|which|where|when|for|if|but|by|with|in total)\b"
)
_COUNTED = re.compile(r"(\$?-?[\d.,/]*\d)\s+([A-Za-z]{2,}[A-Za-z -]*)")
_TEXT = re.compile(r"\$+|\\[()[\]]|\\[a-z]+\s?\{[A-Za-z ]*\}|\\[A-Za-z]+")  # of a formula


class Answer(NamedTuple):
    """`text` is an answer and no more where it stands `alone`; else one is to be looked for in it."""

    text: str
    alone: bool


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


def answers_in(response: str) -> list[Answer]:
    r"""What a response may answer, the likeliest first: its last `\boxed{}`; or else what its end says.

    `<answer>...</answer>` is a box too, where no box is in it or after it. What is thought is not answered:
    all up to the last `</think>` is left out, and a response that is still thinking, or has a box that is
    empty or longer than any answer, has none.
    """
    spoken = response.rpartition("</think>")[2]
    if "<think>" in spoken:
        return []
    *_, tagged = [None, *_ANSWER.finditer(spoken)]
    boxed = last_boxed(spoken if tagged is None else spoken[tagged.start(1) :])
    if boxed is None and tagged is not None:
        boxed = tagged[1].strip()
    if boxed is not None:
        return [Answer(boxed, alone=True)] if boxed and len(boxed) <= TAIL else []
    tail = spoken[-TAIL:].strip()
    if not tail:
        return []
    said = _said(tail)
    searched = Answer(tail, alone=False)
    return [Answer(said, alone=True), searched] if said else [searched]


def _said(tail: str) -> str | None:
    """The answer that a text without a box says in so many words; None where it is all prose."""
    *_, mark = [None, *_MARK.finditer(tail)]
    if mark is None and "\n" not in tail and not re.search("[A-Za-z]{2}", _TEXT.sub(" ", tail)):
        return tail
    if mark is None:
        *_, last = [None, *_FORMULAS.finditer(tail)]
        return None if last is None or re.search(r"\w", tail[last.end() :]) else _BRACKETS.sub(" ", last[0])
    rest = tail[mark.end() :].strip()
    formulas = _FORMULAS.search(rest)
    end = _END.search(rest, formulas.end() if formulas and _is_first(rest, formulas) else 0)
    clause = rest[: end.start() if end else None].strip(" *")
    if formulas is not None and formulas.end() <= len(clause):
        before, after = clause[: formulas.start()], clause[formulas.end() :].strip()
        said = _BRACKETS.sub(" ", formulas[0])
        said += rf" \text{{ {after}}}" if re.fullmatch("[A-Za-z ]+", after) else ""
        return f"{before}{said}" if turns(before) else said
    if _COUNTED.fullmatch(clause):
        return _COUNTED.sub(r"\1 \\text{ \2}", clause)
    is_prose = re.match("[A-Za-z]{2,}", clause) and re.search(r"\d", clause) and not turns(clause)
    return None if is_prose else clause


def _is_first(rest: str, formulas: re.Match[str]) -> bool:
    """Whether the sentence does not end before the formulas do."""
    end = _END.search(rest)
    return end is None or end.start() >= formulas.start()
