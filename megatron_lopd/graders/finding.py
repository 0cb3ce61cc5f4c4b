r"""Where a response says its answer: a \boxed{}, or else what stands after "the answer is", or all of it."""

from __future__ import annotations

import re
from typing import NamedTuple

from megatron_lopd.graders.surface import turns

# Characters of an answer, and of the end of a response where one without a \boxed{} is looked for: the search
# is by regular expressions that take far longer than the text is.
TAIL = 2000

_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BESIDE = re.compile(
    r"[\s$]{0,4}(?:,|,?[\s$]{0,3}(?:\\text\s?\{)?\s{0,3}(?:and|or)\s{0,3}\}?)[\s$]{0,4}(?:[A-Za-z](?:_\{?\w\}?)?\s?=\s?)?"
)
_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)

# What an answer without a box follows.
_MARK = re.compile(
    r"####|(?<!(?i:wrong) )(?<!(?i:incorrect) )(?<!(?i:false) )"
    r"\b(?i:answer|correct (?:option|choice))s?\b(?:[^.\n$=:\d]{0,40}?\s(?:is|are)\b)?\*{0,2}\s{0,3}"
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
# The number at a text's end, and what makes another thing of it: it isn't 42, x > 42, 41 or 42.
_LAST = re.compile(r"(?:[A-Za-z]\s?=\s?)?-?[\d.,/]*\d[^\w-]{0,6}$")
_TURNED = re.compile(
    r"(?:(?:n['\u2019]t|\b(?:not|nor|cannot|than|at least|at most|about|almost|nearly|close to|over|under"
    r"|above|below|instead of|try))(?:\s(?:be|equal|to))*\s"
    r"|(?<=[\w)}]) ?(?:[<>≠≤≥]|\\(?:[lg](?:t|e|eq)|neq?)(?![A-Za-z])))\W{0,4}$"
)
# Numbers of prose that nobody answers with: those it denies, and those of its steps and sources.
_VALUE = r"[$(]{0,2}(?<![\d.,/])-?\d(?:[\d.,/]*\d)?[$)]{0,2}"
_IS = r"\s(?:is|are|was|would be)\s"
_NO_ANSWER = re.compile(
    rf"(?:n['\u2019]t|\bnot|\bcannot)(?:\s(?:be|equal|to))*\s\W{{0,4}}{_VALUE}"
    rf"|\b(?i:wrong|incorrect|false)\s[a-z]+{_IS}\W{{0,4}}{_VALUE}"
    rf"|{_VALUE}(?:{_IS}(?:[a-z]+ly\s|also\s)?"
    r"(?:(?:wrong|incorrect|false|impossible|too|ruled out|excluded|rejected)\b"
    r"|not (?:right|correct|possible|the\b|an? (?:answer|solution)))"
    r"|\s(?:(?:is|was|ca|wo|does)n['\u2019]t|cannot|does not|fails|can be (?:ruled out|excluded))\b"
    r"|\?\s(?:No|Wrong)\b)"
    r"|\b(?i:step|case|part|problem|question|example)\s\d+\*{0,2}\s?[:.)\n]"
    r"|\b(?:[Tt]heorem|[Ll]emma|[Ee]quation|[Ss]ection|[Ff]igure)\s\(?\d+\)?"
)
_JOINED = re.compile(r"\d\W{0,3}\s(?:and|or)\s\W{0,4}$")
_PROSE = re.compile(r"(?<![A-Za-z])(?!(?:and|or)(?![A-Za-z]))[A-Za-z]{2}")
_COUNTED = re.compile(r"(\$?-?[\d.,/]*\d)\s+([A-Za-z]{2,}[A-Za-z -]*)")
_TEXT = re.compile(r"\$+|\\[()[\]]|\\[a-z]+\s?\{[A-Za-z ]*\}|\\[A-Za-z]+")  # of a formula

# A gold that says a number in a sentence, and what may stand before "the answer is" in one.
_SENTENCE = re.compile(
    r"[A-Za-z' ,]{1,400}\b(?:is|are|was|were|be|has|have|had|gets?|costs?|equals?|needs?|takes?)"
    r"\s\W{0,3}\d(?:[\d.,/]*\d)?\W{0,3}(?:\s[A-Za-z ]{1,400})?\W{0,3}"
)
_OPENING = re.compile(r"[A-Za-z, ]{0,100}")


class Answer(NamedTuple):
    """`text` is an answer and no more where it stands `alone`; else one is to be looked for in it."""

    text: str
    alone: bool


def last_boxed(text: str) -> str | None:
    r"""What the last closed `\boxed{...}` (or `\fbox`) holds, braces nested; None without one.

    Of several in a row, x = \boxed{1} or x = \boxed{2}, what all of them hold.
    """
    boxes: list[tuple[int, str, int]] = []  # where it begins, what it holds, where it ends
    opened: list[tuple[int, int] | None] = []  # where a box and its content begin; None for any other brace
    for token in _TOKEN.finditer(text):
        if token[0] == "{":
            opened.append(None)
        elif token[0].endswith("{") and len(token[0]) > 2:
            opened.append((token.start(), token.end()))
        elif token[0] == "}" and opened:
            found = opened.pop()
            if found is not None:
                boxes.append((found[0], text[found[1] : token.start()].strip(), token.end()))
    if not boxes:
        return None
    start, content, _ = boxes.pop()
    held = [content]
    while boxes and boxes[-1][2] <= start and _BESIDE.fullmatch(text, boxes[-1][2], start):
        start, content, _ = boxes.pop()
        held.append(content)
    return ", ".join(dict.fromkeys(reversed(held)))


def answers_in(response: str) -> list[Answer]:
    r"""What a response may answer, the likeliest first: its last `\boxed{}`; or else what its end says.

    `<answer>...</answer>` is a box too, where no box is in it or after it. What is thought is not answered:
    all up to the last `</think>` is left out, and a response that is still thinking, or has a box that is
    empty, longer than any answer or, being the only one, cut off, has none.
    """
    spoken = response.rpartition("</think>")[2]
    if "<think>" in spoken:
        return []
    *_, tagged = [None, *_ANSWER.finditer(spoken)]
    boxed = last_boxed(spoken if tagged is None else spoken[tagged.start(1) :])
    if boxed is None and tagged is not None:
        boxed = tagged[1].strip()
        if _MARK.search(boxed[-TAIL:]):
            boxed = _said(boxed[-TAIL:]) or boxed
    if boxed is not None or _has_box(spoken):
        return [Answer(boxed, alone=True)] if boxed and len(boxed) <= TAIL else []
    tail = spoken[-TAIL:].strip()
    if not tail:
        return []
    said = _said(tail)
    searched = [Answer(_NO_ANSWER.sub(" ", tail), alone=False)] if _ends_with_answer(tail) else []
    return [Answer(said, alone=True), *searched] if said else searched


def in_words(gold: str) -> str:
    """`gold`, or what follows "the answer is" in it."""
    mark = _MARK.search(gold)
    if mark is None or "\n" in gold or not _OPENING.fullmatch(gold, 0, mark.start()):
        return gold
    return _said(gold[-TAIL:]) or gold


def is_sentence(gold: str) -> bool:
    """Whether `gold` says a number in a sentence of prose, to which no answer is equal: There are 5 cats."""
    return _SENTENCE.fullmatch(gold) is not None


def _has_box(text: str) -> bool:
    """Whether a box is opened, if only one that never closes: a digit of its number may be missing."""
    return any(len(token[0]) > 2 for token in _TOKEN.finditer(text))


def _ends_with_answer(tail: str) -> bool:
    """Whether prose may be searched: the number at its end, if there is one, is what it says."""
    last = _LAST.search(tail)
    before = "" if last is None else tail[: last.start()]
    return not (_TURNED.search(before) or _JOINED.search(before))


def _said(tail: str) -> str | None:
    """The answer that a text without a box says in so many words; None where it is all prose."""
    *_, mark = [None, *_MARK.finditer(tail)]
    if mark is None and "\n" not in tail and not _PROSE.search(_TEXT.sub(" ", tail)):
        return tail
    if mark is None:
        *_, last = [None, *_FORMULAS.finditer(tail)]
        if last is None or re.search(r"\w", tail[last.end() :]) or _TURNED.search(tail[: last.start()]):
            return None
        return _BRACKETS.sub(" ", last[0])
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
