"""What the texts of two answers decide, and math-verify drops: words, bases, times, units, capitals."""

from __future__ import annotations

import re

from megatron_lopd.graders.notation import DOTS, SPACE, TEXT
from megatron_lopd.graders.number_words import SMALL
from megatron_lopd.graders.units import unit_of

# Bare words: one has four letters, and none has one only, as variables have; a name; and Chinese.
_WORD = re.compile(
    rf"{TEXT}\{{([^{{}}\\$]*)\}}"
    r"|((?:an? )?(?=.*[A-Za-z]{4})[A-Za-z]{2,}(?:[ -][A-Za-z]{2,})*|[A-Z][a-z]{2,}(?: \d+)?|[\u4e00-\u9fff]+)"
)
_SHORT_WORDS = frozenset(["no", "on", "yes", "not", "odd", "all"])
_TWO_NAMES = re.compile(
    r"(?!.*\b(?:Yes|No|True|False)\b)(?:^|(?<=\{))\s*([A-Z][a-z]+) and ([A-Z][a-z]+)\s*(?=\}?$)"
)
# SAS, HTT, XII: no product, which would have a power in place of a letter given twice.
_LETTER_TWICE = re.compile(r"([A-Z])(?:\1[A-Z]|[A-Z]\1)|[A-Z]([A-Z])\2")
_NUMERAL = re.compile(r"[\d)]\}?\s*_")
_GOES_ON = re.compile(rf"\d{SPACE}*{DOTS}")
# Feet or minutes of an arc; but no separator of thousands: 1'000.
_PRIMED = re.compile(r"^[^'\"]*\d\s?(?:['\"](?!\d)|\^\s?\{?\s?\\prime(?![A-Za-z]))")
_ELIDED = re.compile(rf"[,+-]\s*{DOTS}")  # math-verify leaves the dots out, and reads 1, 2, 10
_TIME = re.compile(
    rf"(?:{TEXT}\{{\s*)?(\d{{1,2}}):(\d\d){SPACE}*(?:\\text\{{)?\s*(?:([ap])\.?\s*m\.?)?\s*\}}?", re.I
)
# Words beside a number that make another thing of it.
_TURNING = frozenset(
    [
        *(
            "not",
            "no",
            "cannot",
            "impossible",
            "fails",
            "too",
            "never",
            "wrong",
            "incorrect",
            "false",
            "but",
            "except",
            "minus",
            "negative",
            "plus",
            "times",
            "squared",
            "cubed",
            "factorial",
        ),
        *(
            "twice",
            "double",
            "half",
            "halves",
            "third",
            "thirds",
            "fourths",
            "fifths",
            "sixths",
            "sevenths",
            "eighths",
            "ninths",
            "tenths",
            "hundredths",
            "quarter",
            "least",
            "most",
            "less",
            "more",
            "greater",
            "fewer",
        ),
        *("above", "below", "under", "over", "between", "about"),
    ]
)
# But not where they say what is counted: 3 times, 3 more apples, 3 wrong answers, 8 half-hours.
_COUNTING = re.compile(
    rf"(?<=[\d}}])\s*(?:{TEXT}\{{)?\s*"
    r"(?:(?:times|more|less|fewer)(?! than)(?:| [A-Za-z ]+)|(?:wrong|incorrect|false|impossible) [A-Za-z ]+"
    r"|[a-z]+-[A-Za-z ]+)\s*\}?$"
)
_NO_VARIABLE = re.compile(rf"{TEXT}\{{[^{{}}]*\}}|\\[A-Za-z]+|[A-Za-z]{{3,}}")


def word(text: str) -> str | None:
    """An answer that is no formula but a word, in lower case; None for all else."""
    match = _WORD.fullmatch(text)
    if match is None:
        is_word = text.casefold() in _SHORT_WORDS or _LETTER_TWICE.fullmatch(text) is not None
        return text.casefold() if is_word else None
    found = " ".join((match[1] or match[2] or "").replace("-", " ").split()).strip(" .()")
    found = re.sub(r"^(?i:an?|the) ", "", found)
    return found.casefold() or None


def swapped(text: str) -> str:
    """Two names in the other order; all else as it is, as what is said of one and of another has one."""
    return _TWO_NAMES.sub(r"\2 and \1", text)


def turns(text: str) -> bool:
    """Whether words in `text` make another thing of the number beside them."""
    return bool(_turning(text))


def written(text: str) -> str:
    """An answer as it is written, but for white space, the size of brackets and the kind of dots."""
    return re.sub(DOTS, "...", re.sub(r"\\(?:left|right)(?![A-Za-z])|\s", "", text))


def decided(gold: str, said: str) -> bool | None:
    """Whether two answers are one, as far as their texts can tell; None where they cannot."""
    if _NUMERAL.search(gold) or _NUMERAL.search(said):
        return _in_base(gold) == _in_base(said)
    if _ELIDED.search(gold) or _ELIDED.search(said):
        return written(gold) == written(said)
    if (time := _TIME.fullmatch(gold)) is not None and (other := _TIME.fullmatch(said)) is not None:
        halves = {each[3].lower() for each in (time, other) if each[3]}
        return _minutes(time) == _minutes(other) and len(halves) < 2
    if _contradict(gold, said):
        return False
    return None


def _contradict(gold: str, said: str) -> bool:
    if any((sign.search(gold) is None) != (sign.search(said) is None) for sign in (_GOES_ON, _PRIMED)):
        return True
    if _turning(gold) != _turning(said):
        return True
    units = {unit_of(each) for each in (gold, said)} - {None}
    brackets = {_brackets(each) for each in (gold, said)}
    of_gold, of_said = _variables(gold), _variables(said)
    capitals = of_gold != of_said and {x.lower() for x in of_gold} == {x.lower() for x in of_said}
    return len(units) > 1 or brackets == {"pair", "set"} or capitals


def _turning(text: str) -> frozenset[str]:
    return _TURNING & set(re.findall(r"(?<![\\A-Za-z])[a-z]+", _COUNTING.sub("", text).lower()))


def _in_base(text: str) -> str:
    """Numerals with their bases, however those are set; ten goes without saying."""
    text = re.sub(rf"{TEXT}|\\overline|base|[\s{{}}()$\\,]", "", text)
    for number, name in reversed(list(enumerate(SMALL))):
        text = text.replace(f"_{name}", f"_{number}")
    return re.sub(r"_10(?!\d)", "", text.upper())


def _minutes(time: re.Match[str]) -> int:
    return 60 * int(time[1]) + int(time[2])


def _brackets(text: str) -> str | None:
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])|\s", "", text)
    if re.fullmatch(r"\([^()]*,[^()]*\)", text):
        return "pair"
    return "set" if re.fullmatch(r"\\\{[^()]*\\\}", text) or "\\pm" in text else None


def _variables(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z]", _NO_VARIABLE.sub(" ", text)))
