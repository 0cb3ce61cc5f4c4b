r"""How answers are written: what benchmarks' answers have that math-verify does not read, put as it reads it.

Each rule has its pairs, with reasons, in tests/unit/disputed_answers.tsv.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from re import Match

from megatron_lopd.graders.number_words import NUMBER_WORDS, number
from megatron_lopd.graders.units import CURRENCIES, NAMES

TEXT = r"\\(?:text|operatorname)\s*"  # once `plain` has put all fonts so
DOTS = r"(?:\.{3}|…|\\(?:l|c)?dots(?![A-Za-z]))"
SPACE = r"(?:\s|\\[ ,;:!]|\\q?quad(?![A-Za-z]))"

_DECIMAL = r"(?:\d+(?:\.\d+)?|\.\d+)"
_GROUPED = r"[1-9]\d{0,2}(?:(?:,|\{,\})\d{3})+(?:\.\d+)?"
_NUMBER = rf"-?(?:{_GROUPED}|\d+/\d+|{_DECIMAL})"
_MANY = {
    "dozen": "12",
    "lakh": "10^{5}",
    "crore": "10^{7}",
    "hundred": "10^{2}",
    "thousand": "10^{3}",
    "million": "10^{6}",
} | {
    "billion": "10^{9}",
    "trillion": "10^{12}",
    "万": "10^{4}",
    "亿": "10^{8}",
}
_TH = r"\s*(?:st|nd|rd|th)"
_INTEGERS = r"all (?:the )?integers|(?:the )?set of (?:all )?(?:the )?integers|(?:the )?integers"
_ALL = r"(?:the )?(?:set of )?(?:all )?(?:the )?(?:real numbers|reals)|all real"
_NOTHING = r"(?:there (?:is|are) )?no (?:real )?solutions?|(?:the )?empty set"

_SIGNS = {
    **dict.fromkeys("\u2212\u2013\ufe63", "-"),
    **dict.fromkeys("\u00a0\u2002\u2003\u2009\u202f\u3000\t\n~", " "),
    **dict.fromkeys("\u2032\u2019", "'"),
    **dict.fromkeys("\u00b0\u00ba\u02da", r"^\circ "),
    **{
        "½": r"\frac{1}{2}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
        "⅓": r"\frac{1}{3}",
        "⅔": r"\frac{2}{3}",
    },
    **{"\u00d7": r"\times ", "·": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "θ": r"\theta ", "∞": r"\infty "},
    **{"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∅": r"\emptyset ", "\u222a": r"\cup "},
    **{"∈": r"\in ", "∠": r"\angle ", "\u211d": r"\mathbb{R}", "²": "^2", "³": "^3", "、": ",", "。": "."},
}
# And those of full width.
_CHARACTERS = str.maketrans({chr(0xFEE0 + code): chr(code) for code in range(0x21, 0x7F)} | _SIGNS)
_DEGREES = (
    r"\^\s*(?:\{(?:\s|\\[,;! ])*(?:\\circ|\\mathrm\{o\}|[oO∘])\s*\}|\\circ(?![A-Za-z])|[oO∘](?![A-Za-z]))"
)
# Two names of one sign; what only looks. Of any text, an answer or not.
_SPELLINGS = tuple(
    (re.compile(pattern), instead)
    for pattern, instead in (
        (r"(?<!\\)\\!\s*", ""),
        (r"(?<=[A-Za-z])n't\b", " not"),
        (r"(?<!\\)(?:\s|\\[ ,;:!]|\\q?quad(?![A-Za-z])){2,}", " "),
        (r"\\[Bb]igg?[lrm]?(?![A-Za-z])\s?", ""),
        (r"\\([lr])brace(?![A-Za-z])\s?", lambda m: r"\{" if m[1] == "l" else r"\}"),
        (rf"(?<=[\d)}}])(?:\s|\\[,; !]|\{{\}})?(?:\\deg(?:ree)?(?![A-Za-z])|{_DEGREES})", r"^\\circ "),
        (r"\{\\rm\s?([A-Za-z ./]+)\}|\\rm\s?\{([A-Za-z ./]+)\}", r"\\text{\1\2}"),
        (r"\\math(?:bf|rm|it|sf)\s(?=\d)", ""),
        (r"\\(?:bf|it|rm|large|Large|LARGE|huge|Huge|boldmath)(?![A-Za-z])\s?", ""),
        (r"\\(?:text)?color\s?\{[A-Za-z!\d]*\}\s?|\\(?:underline|uline|bold(?:symbol)?|bm)(?=\s?\{)", ""),
        (r"\s?(?:\\(?:checkmark|blacksquare|square|Box|qed)(?![A-Za-z])|[✓✔■□∎])\s?$", ""),
        (r"(?<=\\in)\s?(?:\\math(?:bf|rm)\s?\{([NQRZ])\}|([NQRZ])(?![A-Za-z]))", r" \\mathbb{\1\2}"),
        (r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)|math(?:bf|it|rm|sf|tt)|emph|[mh]box)(?=\s?\{)", r"\\text"),
        (r"(\\text\s?\{)\s?(?:\\[ ,;:!]\s?)+", r"\1 "),
        (r"\\text\s?\{\s?(\\?%|[\d.,/-]+)\s?\}", r"\1"),
        (r"\\dot\s?\{?(\d)\}?(?:(\d*)\\dot\s?\{?(\d)\}?)?", r"\\overline{\1\2\3}"),
    )
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

# What an equation may say the value of, where math-verify cannot read or keep its name.
_QUANTITY = re.compile(
    r"(\\(?:sin|cos|tan|cot)(?![A-Za-z])\s?(?:\\angle\s?)?[A-Z]{1,3}|\|[A-Z]{1,3}\||(?:\\angle\s?)?(?=[A-Z]*[XYZ])[A-Z]{2,3}"
    r"|(?:\\Pr|\\mathbb\s?\{[PE]\}|[PED]|Var|(?:[A-Za-z]_\s?)?\{?\\(?:max|min|gcd|lcm)\}?(?:\s?[a-z])?)\s?(?:\\left)?\([^()]*\)"
    r"|(?:[A-Za-z]_\s?)?\{?\\(?:max|min)\}?)\s?=([^=]*)"
)
_SUCH_THAT = r"(?:\\middle\s?)?(?:\\mid(?![A-Za-z])|\||\\vert(?![A-Za-z])|:)"

_OR = re.compile(rf"\s?(?:,\s?)?(?:{TEXT}\{{\s?or\s?\}}|\bor\b|\\(?:lor|vee|cup)(?![A-Za-z]))\s?")
_AND = re.compile(rf"\s?(?:,\s?)?(?:{TEXT}\{{\s?and\s?\}}|\band\b|\\(?:land|wedge|cap)(?![A-Za-z]))\s?")
_INEQUALITY = re.compile(r"[<>]|\\(?:[lg](?:t|e|eq|eqslant)|neq?)(?![A-Za-z])")

_TRAILING = re.compile(
    rf"(?:(?:{SPACE}|\\cdot|/)*\\text\s?\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}\s?(?:\^\s?\{{?-?\d\}}?)?)+$"
)

# (pattern, what is put in its place), in order.
_RULES: tuple[tuple[str, str | Callable[[Match[str]], str]], ...] = (
    (rf"^(?:\*|{SPACE})+|(?:\*|{SPACE}|[,;]|\\\\?){{1,20}}$", ""),
    (r"(?<![.\\])\.$", ""),
    (r"^(?:\\approx(?![A-Za-z])|=)\s?", ""),
    (r"\\(?:displaystyle|textstyle)(?![A-Za-z])\s*", ""),
    (rf"^{TEXT}\{{[^{{}}]*(?:\bis|\bare|:|=)\s*\}}", ""),  # The answer is
    (r"^.*(?:\\(?:(?:Long)?Rightarrow|implies|therefore)(?![A-Za-z])|[⇒∴])\s?", ""),
    (r"^\{(?!.*\\(?:choose|over)(?![a-z]))((?:[^{}]|\{[^{}]*\})*)\}$", r"\1"),
    # Equations below each other.
    (
        r"^(?:\\left\s?)?(?:\\\{)?\s?\\begin\{(cases|array|aligned)\}(?:\{[lcr]+\})?([^&]*)\\end\{\1\}(?:\s?\\right\s?\.)?$",
        lambda m: re.sub(r"\s?,?\s?\\\\", ",", m[2]).strip(" ,"),
    ),
    # A prime is a name of its own.
    (
        r"([A-Za-z])(?:_(?:\{(\w+)\}|(\w)))?((?:'|\^\s?\{?(?:\s?\\prime(?![A-Za-z]))+\s?\}?)+)",
        lambda m: f"{m[1]}_{{{m[2] or m[3] or ''}{'p' * (m[4].count(chr(39)) + m[4].count('prime'))}}}",
    ),
    (
        rf"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])(?:\^\{{?-?\d\}}?)?\s?(?:\([^()]*\)|[^=,;()]*?{_DEGREES})",
        lambda m: _in_radians(m[0]),
    ),
    # For any integer k; and the set of the x for which.
    (
        rf"(?<=[\w)}}\]])(?:{SPACE}|[,;])*(?:{TEXT}\{{[a-z, ]*\}}\s?)?\(?{SPACE}*(?<![\\A-Za-z])[A-Za-z]"
        r"(?:\s?,\s?[A-Za-z])*\s?\\in\s?\\mathbb\s?\{?([NQRZ])\}?([_^]\{?[*+]\}?)?\s?\)?$",
        lambda m: rf" \text{{ in {m[1]}{'*' * bool(m[2])}}}",
    ),
    (
        rf"^(?:\\left\s?)?\\\{{\s?([a-z])\s?(?:\\in\s?\\mathbb\s?\{{?R\}}?\s?)?{_SUCH_THAT}\s?(?:\1\s?\\in\s?\\mathbb\s?\{{R\}}\s?,\s?)?((?=[^{{}}]*\b\1\b)[^|]*?)(?:\\right)?\s?\\\}}$",
        r"\2",
    ),
    (
        r"^[①-⑳][①-⑳,\s]*$",
        lambda m: rf"\text{{{''.join(sorted(set(re.findall('[①-⑳]', m[0]))))}}}",
    ),
    (
        r"(?:(?<=[\d})$])|(?<=[a-z]))\s?(?:\\text\s?\{)?\s?(?:或|或者)\s?\}?\s?(?=[\d\\a-z(-])",
        r" \\text{ or } ",
    ),
    (
        r"(?:(?<=[\d})$])|(?<=[a-z]))\s?(?:\\text\s?\{)?\s?[和与且]\s?\}?\s?(?=[\d\\a-z(-])",
        r" \\text{ and } ",
    ),
    (rf"^(?i:(?:{TEXT}\{{)?\s*(?:option|choice|answer):?)\s+\(?([A-J])\)?\s*\}}?$", r"\1"),
    (rf"^(?:故?选项?:?\s?)?(?:{TEXT}\{{\s?)?\(?([A-J])[).:]?\s?\}}?$", r"\1"),
    # Several choices at once, as Chinese tests have: ABD.
    (rf"^{TEXT}\{{\s?(A?B?C?D?E?F?)\s?\}}$", r"\1"),
    (r"^(?=[A-F]{2,6}$)(?!.*(.).*\1).*$", lambda m: ", ".join(sorted(m[0]))),
    (rf"^{TEXT}\{{\s?(\d{{1,2}}(?::\d\d)?)\s?([AaPp])\.?\s?[Mm]\.?\s?\}}$", r"\1 \\text{ \2m}"),
    (r"\\[lr]angle(?![A-Za-z])", lambda m: ")" if m[0][1] == "r" else "("),
    (rf"^(\w+)\s*(?:{TEXT}\{{)?\s*\(?base\s*\}}?\s*(\d+)\)?\s*\}}?$", r"\1_{\2}"),
    # The remainder that a number leaves.
    (
        rf"^(\d{{1,40}})\s*(?:\\b?mod(?![A-Za-z])|{TEXT}\{{\s*mod\s*\}}|mod\b){SPACE}*\{{?0*([1-9]\d{{0,40}})\}}?$",
        lambda m: rf"{int(m[1]) % int(m[2])} \pmod{{{m[2]}}}",
    ),
    (
        rf"\s*(?:\\pmod|\\bmod|\(?{TEXT}\{{\s*mod\s*\}}|\(?mod\b){SPACE}*\{{?(\d+)\}}?\)?$",
        r" \\text{ mod \1}",
    ),
    (r"√\s*(?:\(([^()]*)\)|(\d+|[A-Za-z]))", lambda m: rf"\sqrt{{{m[1] or m[2]}}}"),
    (r"\\varnothing(?![A-Za-z])|\\\{(?:\s|\\[,;! ])*\\\}", r"\\emptyset "),
    (rf"^(?i:(?:{TEXT}\{{)?\s*(?:{_NOTHING})\s*\}}?)$", r"\\emptyset "),
    (rf"^(?i:(?:{TEXT}\{{)?\s*(?:{_ALL})\s*\}}?)$|^{TEXT}\{{R\}}$", r"\\mathbb{R}"),
    (rf"^(?i:(?:{TEXT}\{{)?\s*(?:{_INTEGERS})\s*\}}?)$", r"\\mathbb{Z}"),
    (rf"^(?:{TEXT}\{{)?\s?infinity\s?\}}?$", r"\\infty"),
    (rf"{TEXT}\{{\s*([ij])\s*\}}|(?<=\d){SPACE}*{TEXT}\{{\s*([xyz])\s*\}}$", r"\1\2"),
    (rf"(?<=\d){SPACE}*{TEXT}\{{\s*pi\s*\}}$", r"\\pi"),
    (
        rf"\s*{TEXT}\{{\s*percent(?:age\spoints?)?\s*\}}|(?<=\d)\s*percent(?:age\spoints?)?\b",
        r"\\%",
    ),
    # Natural logarithms.
    (r"\\log\s?_\s?(?:e|\{\s?e\s?\})(?![A-Za-z])", r"\\ln "),
    # Ordinals: 4th.
    (rf"(?<=\d)(?:\^\{{{TEXT}\{{{_TH}\}}\}}|\^?{TEXT}\{{{_TH}\}}|\^\{{{_TH}\}}|{_TH}\b)", ""),
    (
        rf"(?<=\d){SPACE}*(?:{TEXT}\{{\s*)?({'|'.join(_MANY)})s?\b\s*\}}?",
        lambda m: rf"\cdot {_MANY[m[1]]} ",
    ),
    (rf"^(\\?\$?\s?{_NUMBER}){SPACE}*{TEXT}\{{\s*k\s*\}}$", rf"\1\\cdot {_MANY['thousand']} "),
    # A number and a fraction: 1 3/4 is no product. In LaTeX math-verify knows, but not of percents.
    (rf"(?<![\d.}}/^_])(\d+){SPACE}+(\d+)\s*/\s*(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),
    (
        rf"(\d+){SPACE}*\\[dt]?frac\s?(?:(\d)\s?(\d)|\{{(\d+)\}}\s?\{{(\d+)\}}){SPACE}*\\?%",
        lambda m: _mixed(int(m[1]), int(m[2] or m[4]), m[3] or m[5]),
    ),
    # Of more than two, which are no quotient of quotients: 2:3:4.
    (r"^(?!0+:)[^:,;=<>]+(?::[^:,;=<>]+){2,}$", lambda m: _ratio(m[0].split(":"))),
    (r"^.*\\pm.*$", lambda m: _both_signs(m[0])),
    (r"(\d+)\.(\d*)\\overline\s*\{?(\d+)\}?", lambda m: _repeating(*m.groups())),
    (rf"(\d{{1,40}})\.(\d{{0,40}}?)(\d{{1,3}}?)\3{{2,20}}\s*{DOTS}", lambda m: _repeating(*m.groups())),
    # Text that is a number, numbers, or a number of something.
    (rf"^{TEXT}\{{\s*(?![A-Za-z]\s*\}})((?:(?![A-Za-z]{{2}})[^{{}}①-⑳\u4e00-\u9fff])+?)\s*\}}$", r"\1"),
    (r"(?<=[\d}])\s?(?:\\text\s?\{)?\s?([\u4e00-\u9fff]+)\}?(\^\{?\d\}?)?$", r" \\text{ \1}\2"),
    (
        rf"^{TEXT}\{{([\d\s,.]+(?:(?:and|or)[\d\s,.]+)+)\}}$",
        lambda m: re.sub(r"\s*,?\s*(?:and|or)", ",", m[1]),
    ),
    (rf"^(?i:(?:{TEXT}\{{)?\s*({NUMBER_WORDS})\s*\}}?)$", lambda m: str(number(m[1]))),
    (rf"^{TEXT}\{{\s*({_NUMBER})\s+([A-Za-z][A-Za-z .]*)\}}$", r"\1 \\text{ \2}"),
    (rf"^({_NUMBER})\s*({NAMES})(\^\{{?\d\}}?)?$", r"\1 \\text{ \2}\3"),
    (rf"^({_NUMBER})\s([mgshL](?:/[a-z]+)?)(\^\{{?\d\}}?)?$", r"\1 \\text{ \2}\3"),
    (
        rf"(?:(?<=[\d}}])\s*|(?<=\\pi)\s)([ckm]m|kg|(?!(?:in|ft|yd|mi|mg|lb|oz|hr)(?![a-z]))(?:{NAMES}))(\^\{{?\d\}}?)?$",
        r" \\text{ \1}\2",
    ),
    (rf"^({_NUMBER})\s+((?:[A-Za-z]{{4,}}|[b-z][aeiou][a-z])(?:[ -][A-Za-z]+)*)$", r"\1 \\text{ \2}"),
    (
        rf"^(-?)(?:{TEXT}\{{)?\\?([{''.join(CURRENCIES)}])\}}?\s*({_NUMBER})$",
        lambda m: rf"{m[1]}{m[3]} \text{{ {CURRENCIES[m[2]]}}}",
    ),
    # Thousands set apart, which are otherwise a product, or a pair: 1 234; (1,000), while (1,200) is a pair.
    (
        rf"(^|=\s*)(-?\d{{1,3}}(?:(?:{SPACE}|')\d{{3}})+(?:\.\d+)?)$",
        lambda m: m[1] + re.sub(rf"{SPACE}|'", "", m[2]),
    ),
    (r"^\(\s*([1-9]\d{0,2}(?:,\d{3})*,0\d\d(?:,\d{3})*)\s*\)$", r"\1"),
    (rf"(?:^|=\s*|(?<=[A-Za-z}}]\{{))-?{_GROUPED}(?![\d,])", lambda m: re.sub(r"[,{}]", "", m[0])),
    # As well where what follows a comma that separates is a space: (1,000, 2,000).
    (
        rf"^(?=.*\d,{SPACE})(?!.*,(?!{SPACE}|\d{{3}}(?!\d))).*$",
        lambda m: re.sub(rf"(?<![\d,])-?{_GROUPED}(?![\d])", lambda n: n[0].replace(",", ""), m[0]),
    ),
)
_COMPILED = [(re.compile(pattern), instead) for pattern, instead in _RULES]


def plain(text: str) -> str:
    """`text`, an answer or a sentence, with characters as LaTeX and powers of ten written out."""
    text = text.translate(_CHARACTERS)
    for pattern, instead in _SPELLINGS:
        text = pattern.sub(instead, text)
    text = _TIMES_TEN.sub(_written_out, text)
    return _POWER_OF_TEN.sub(lambda m: m[0] if _is_ambiguous(m) else _written_out(m), text)


def letter(text: str) -> str | None:
    """The choice that an answer begins with: B of (B) 7."""
    found = _CHOICE.fullmatch(plain(text).strip().strip("$").strip())
    return None if found is None else found[1] or found[2]


def quantity(text: str) -> tuple[str | None, str]:
    """The name of what has a value, and that; no name where math-verify reads both."""
    found = _QUANTITY.fullmatch(text)
    return (None, text) if found is None else (re.sub(r"\s", "", found[1]), found[2].strip())


def conditions(text: str) -> list[list[str]]:
    """Those of an answer, all of one of the lists hold; none of one that is none, or a single one."""
    found = [_AND.split(each) for each in _OR.split(text)]
    several = sum(map(len, found)) > 1 and _INEQUALITY.search(text) is not None
    return found if several else []


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


def unitless(text: str) -> str:
    """An answer without the text at its end."""
    return _TRAILING.sub("", text) or text


def _in_radians(function: str) -> str:
    return re.sub(rf"(\d+(?:\.\d+)?|\.\d+|\\?[A-Za-z]+)\s?{_DEGREES}", r"\\frac{\1\\pi}{180}", function)


def _mixed(whole: int, above: int, below: str) -> str:
    """As many percent and a part of one, as one fraction."""
    return rf"\frac{{{whole * int(below) + above}}}{{{below}}}\%"


def _ratio(parts: list[str]) -> str:
    """What each part is of the first: the same for the same ratio."""
    first, *others = (part.strip() for part in parts)
    quotients = [rf"\frac{{{each}}}{{{first}}}" for each in others]
    return f"({','.join(quotients)})"


def _both_signs(text: str) -> str:
    r"""Two answers of one with a \pm in braces, as in a fraction, where math-verify does not read it."""
    before, _, after = text.partition(r"\pm")
    opened = re.sub(r"\\[{}]", "", before)
    if opened.count("{") == opened.count("}") or r"\pm" in after or r"\mp" in text:
        return text
    both = f"{before}+{after}, {before}-{after}"
    return both if re.search(r"[=,]", text) else rf"\{{{both}\}}"


def _repeating(whole: str, fixed: str, period: str) -> str:
    """0.1 and then 6 for ever, as a fraction."""
    below = (10 ** len(period) - 1) * 10 ** len(fixed)
    above = int(whole + fixed + period) - int(whole + fixed)
    return rf"\frac{{{above}}}{{{below}}}"
