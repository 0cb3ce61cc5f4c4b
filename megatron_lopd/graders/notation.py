r"""How answers are written: what benchmarks' answers have that math-verify does not read, put as it reads it.

Each rule has its pairs, with reasons, in tests/unit/disputed_answers.tsv.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from re import Match

from megatron_lopd.graders.units import CURRENCIES, NAMES

TEXT = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s*"
DOTS = r"(?:\.{3}|…|\\(?:l|c)?dots(?![A-Za-z]))"
SPACE = r"(?:\s|~|\\[ ,;:!]|\\q?quad(?![A-Za-z]))"
COUNTED = (
    *("zero", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
)

_DECIMAL = r"(?:\d+(?:\.\d+)?|\.\d+)"
_GROUPED = r"[1-9]\d{0,2}(?:(?:,|\{,\})\d{3})+(?:\.\d+)?"
_NUMBER = rf"-?(?:{_GROUPED}|\d+/\d+|{_DECIMAL})"
_MANY = {"dozen": "12", "hundred": "10^{2}", "thousand": "10^{3}"} | {
    "million": "10^{6}",
    "billion": "10^{9}",
    "trillion": "10^{12}",
}
_TH = r"\s*(?:st|nd|rd|th)"
_NOTHING = r"(?:there (?:is|are) )?no (?:real )?solutions?|(?:the )?empty set"

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2013\ufe63\uff0d", "-"),
        **dict.fromkeys("\u00a0\u2002\u2003\u2009\u202f\t\n", " "),
        **{
            "½": r"\frac{1}{2}",
            "¼": r"\frac{1}{4}",
            "¾": r"\frac{3}{4}",
            "⅓": r"\frac{1}{3}",
            "⅔": r"\frac{2}{3}",
        },
        **{
            "\u00d7": r"\times ",
            "·": r"\cdot ",
            "÷": r"\div ",
            "π": r"\pi ",
            "∞": r"\infty ",
            "°": r"^\circ ",
        },
        **{"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∅": r"\emptyset ", "\u222a": r"\cup "},
        **{"θ": r"\theta ", "²": "^2", "³": "^3"},
    }
)
# As a program writes a number with a power of ten, and as a person does.
_POWER_OF_TEN = re.compile(rf"(?<![\w\\.}}])({_DECIMAL}|\d+\.)[eE]([+-]?)(\d+)(?![\w.^{{])")
_TIMES_TEN = re.compile(
    rf"(?<![\w\\.}}])({_DECIMAL})\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{{\s*(-?)(\d+)\s*\}}|(-?)(\d+))"
)
_LARGEST_POWER = 400  # that is written out

_CHOICE = re.compile(
    rf"(?:{TEXT}\{{\s*)?(?:\(([A-J])\)|([A-J])[).:])"
    rf"(?!\s*\}}?{SPACE}*(?:and|or)\b)\s*\}}?(?:{SPACE}|[:.,])*(.*)",
    re.DOTALL,
)

# (pattern, what is put in its place), in order.
_RULES: tuple[tuple[str, str | Callable[[Match[str]], str]], ...] = (
    (rf"^(?:\*|{SPACE})+|(?:\*|{SPACE}|[,;]|\\\\)+$", ""),
    (r"(?<![.\\])\.$", ""),
    (r"\\(?:displaystyle|textstyle)(?![A-Za-z])\s*", ""),
    (rf"^{TEXT}\{{[^{{}}]*(?:\bis|\bare|:|=)\s*\}}", ""),  # The answer is
    (rf"^(?i:(?:{TEXT}\{{)?\s*(?:option|choice|answer):?)\s+\(?([A-J])\)?\s*\}}?$", r"\1"),
    (r"\\[lr]angle(?![A-Za-z])", lambda m: ")" if m[0][1] == "r" else "("),
    (rf"^(\w+)\s*(?:{TEXT}\{{)?\s*\(?base\s*\}}?\s*(\d+)\)?\s*\}}?$", r"\1_{\2}"),
    (rf"\s*(?:\\pmod|\\bmod|{TEXT}\{{\s*mod\s*\}}|\(?mod\b)\s*\{{?(\d+)\}}?\)?$", r" \\text{ mod \1}"),
    (r"√\s*(?:\(([^()]*)\)|(\d+|[A-Za-z]))", lambda m: rf"\sqrt{{{m[1] or m[2]}}}"),
    (r"\\varnothing(?![A-Za-z])|\\\{(?:\s|\\[,;! ])*\\\}", r"\\emptyset "),
    (rf"^(?i:(?:{TEXT}\{{)?\s*(?:{_NOTHING})\s*\}}?)$", r"\\emptyset "),
    (rf"{TEXT}\{{\s*([ij])\s*\}}", r"\1"),
    (rf"\s*{TEXT}\{{\s*percent\s*\}}|(?<=\d)\s*percent\b", r"\\%"),
    # Ordinals: 4th.
    (rf"(?<=\d)(?:\^\{{{TEXT}\{{{_TH}\}}\}}|\^?{TEXT}\{{{_TH}\}}|\^\{{{_TH}\}}|{_TH}\b)", ""),
    (
        rf"(?<=\d){SPACE}*(?:{TEXT}\{{\s*)?({'|'.join(_MANY)})\b\s*\}}?",
        lambda m: rf"\cdot {_MANY[m[1]]} ",
    ),
    # A number and a fraction: 1 3/4 is no product. In LaTeX math-verify knows.
    (rf"(?<![\d.}}/^_])(\d+){SPACE}+(\d+)\s*/\s*(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),
    (r"(\d+)\.(\d*)\\overline\s*\{?(\d+)\}?", lambda m: _repeating(*m.groups())),
    (rf"(\d+)\.(\d*?)(\d{{1,3}}?)\3{{2,}}\s*{DOTS}", lambda m: _repeating(*m.groups())),
    # Text that is a number, numbers, or a number of something.
    (rf"^{TEXT}\{{\s*([^A-Za-z{{}}]+?)\s*\}}$", r"\1"),
    (
        rf"^{TEXT}\{{([\d\s,.]+(?:(?:and|or)[\d\s,.]+)+)\}}$",
        lambda m: re.sub(r"\s*,?\s*(?:and|or)", ",", m[1]),
    ),
    (rf"^(?i:(?:{TEXT}\{{)?\s*({'|'.join(COUNTED)})\s*\}}?)$", lambda m: str(COUNTED.index(m[1].lower()))),
    (rf"^{TEXT}\{{\s*({_NUMBER})\s+([A-Za-z][A-Za-z .]*)\}}$", r"\1 \\text{ \2}"),
    (rf"^({_NUMBER})\s*({NAMES})(\^\{{?\d\}}?)?$", r"\1 \\text{ \2}\3"),
    (rf"^({_NUMBER})\s+([A-Za-z]{{4,}}(?: [A-Za-z]+)*)$", r"\1 \\text{ \2}"),
    (
        rf"^(-?)(?:{TEXT}\{{)?\\?([{''.join(CURRENCIES)}])\}}?\s*({_NUMBER})$",
        lambda m: rf"{m[1]}{m[3]} \text{{ {CURRENCIES[m[2]]}}}",
    ),
    # Thousands set apart, which are otherwise a product, or a pair: 1 234; (1,000), while (1,200) is a pair.
    (
        r"(^|=\s*)(-?\d{1,3}(?:(?:\\[,!;: ]| )\d{3})+(?:\.\d+)?)$",
        lambda m: m[1] + re.sub(r"\\[,!;: ]| ", "", m[2]),
    ),
    (r"^\(\s*([1-9]\d{0,2}(?:,\d{3})*,0\d\d(?:,\d{3})*)\s*\)$", r"\1"),
    (rf"(?:^|=\s*)-?{_GROUPED}(?![\d,])", lambda m: re.sub(r"[,{}]", "", m[0])),
)
_COMPILED = [(re.compile(pattern), instead) for pattern, instead in _RULES]


def plain(text: str) -> str:
    """`text`, an answer or a sentence, with characters as LaTeX and powers of ten written out."""
    text = text.translate(_CHARACTERS)
    text = _TIMES_TEN.sub(_written_out, text)
    return _POWER_OF_TEN.sub(lambda m: m[0] if _is_ambiguous(m) else _written_out(m), text)


def readings(text: str) -> list[str]:
    """What an answer may mean, as math-verify reads it: one thing, or two.

    Two of a choice with what it says, (B) 7; and of 2e-3, which a program writes for 0.002 and a person for
    twice Euler's number, less 3.
    """
    text = plain(text).strip().strip("$").strip()
    choice = _CHOICE.fullmatch(text)
    if choice is not None and choice[3].strip(" ."):
        return [choice[1] or choice[2], *readings(choice[3])]
    for pattern, instead in _COMPILED:
        text = pattern.sub(instead, text)
    other = _POWER_OF_TEN.sub(_written_out, text)
    return [text] if other == text else [text, other]


def _is_ambiguous(match: Match[str]) -> bool:
    mantissa, sign, digits = match.groups()
    return sign != "" and len(digits) == 1 and "." not in mantissa and mantissa != "1"


def _written_out(match: Match[str]) -> str:
    mantissa, sign, digits = (each for each in match.groups() if each is not None)
    if int(digits[:9]) > _LARGEST_POWER:
        return match[0]
    return format(Decimal(f"{mantissa}e{sign}{digits}"), "f")


def _repeating(whole: str, fixed: str, period: str) -> str:
    """0.1 and then 6 for ever, as a fraction."""
    below = (10 ** len(period) - 1) * 10 ** len(fixed)
    above = int(whole + fixed + period) - int(whole + fixed)
    return rf"\frac{{{above}}}{{{below}}}"
