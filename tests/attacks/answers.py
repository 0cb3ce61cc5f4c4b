"""Answers to draw: numbers in all the ways to write one, and text that no one would write."""

from __future__ import annotations

from decimal import Decimal, localcontext
from fractions import Fraction

from hypothesis import strategies as st

_PIECES = [
    *(
        r"\frac",
        r"\sqrt",
        r"\boxed",
        r"\text",
        r"\left(",
        r"\right)",
        r"\{",
        r"\}",
        r"\pm ",
        r"\cdot ",
        r"\infty ",
    ),
    *(
        r"\begin{pmatrix}",
        r"\end{pmatrix}",
        r"\overline",
        r"\%",
        r"\$",
        r"\\",
        r"^\circ ",
        r"\ldots ",
        r"\pi ",
    ),
    *(
        "{",
        "}",
        "(",
        ")",
        "[",
        "]",
        "^",
        "_",
        "&",
        ",",
        ".",
        ":",
        ";",
        "=",
        "<",
        "+",
        "-",
        "/",
        "!",
        "'",
        "|",
        "$",
    ),
    *(
        "0",
        "1",
        "2",
        "7",
        "10",
        "99",
        "e",
        "E",
        "i",
        "x",
        "X",
        "no",
        "on",
        "cm",
        "million",
        "th",
        "and",
        "or",
        " ",
    ),
    *(
        "<answer>",
        "</answer>",
        "<think>",
        "</think>",
        "\u2212",
        "\u00bd",
        "\u221a",
        "\u0665",
        "\x00",
        "\ud7ff",
    ),
]
# What hangs, recurses or fills memory, where it is worked out.
_EXPENSIVE = [
    r"9^{9^{9^{9}}}",
    r"10^{10^{10}}",
    "(9999999!)!",
    r"\binom{10^9}{10^8}",
    "(" * 3000,
    "1e999999999",
]

texts = st.lists(st.sampled_from(_PIECES), max_size=25).map("".join) | st.text(max_size=40)
hostile = texts | st.sampled_from(_EXPENSIVE)
values = st.builds(
    lambda above, power, below: Fraction(above) * Fraction(10) ** power / below,
    st.integers(-(10**9), 10**9),
    st.integers(-12, 12),
    st.sampled_from([1, 1, 1, 2, 3, 7, 8, 11, 16]),
)


def near(value: Fraction) -> st.SearchStrategy[Fraction]:
    """Numbers that are not `value`, and might be taken for it."""
    one = Fraction(1)
    shift = st.integers(1, 40).map(lambda digits: value + one / 10**digits)
    scale = st.integers(3, 40).map(lambda digits: value * (1 - one / 10**digits))
    other = st.sampled_from([-value, value * 10, value / 10, value * 100, value / 100, value + 1])
    return (shift | scale | other).filter(lambda drawn: drawn != value)


@st.composite
def written(draw: st.DrawFn, value: Fraction) -> str:
    """`value`, exactly."""
    above, below = value.numerator, value.denominator
    sign, whole, rest = "-" * (value < 0), abs(above) // below, abs(above) % below
    forms = [
        f"{above}/{below}",
        rf"\frac{{{above}}}{{{below}}}",
        rf"{sign}\dfrac{{{2 * abs(above)}}}{{{2 * below}}}",
    ]
    if whole and rest:
        forms += [rf"{sign}{whole}\frac{{{rest}}}{{{below}}}", f"{sign}{whole} {rest}/{below}"]
    if below == 1:
        forms += [
            f"{above:,}",
            f"{above:,}".replace(",", r"\,"),
            f"{above:,}".replace(",", "{,}"),
            f"{above}.0",
        ]
    with localcontext() as context:
        context.prec = 200
        decimal = Decimal(above) / Decimal(below)
        if Fraction(decimal) == value:
            exponent = decimal.adjusted()
            mantissa = format(decimal.scaleb(-exponent), "f")
            forms += [format(decimal, "f"), rf"{format(decimal * 100, 'f')}\%", f"{mantissa}e{exponent:+03d}"]
            forms += [rf"{mantissa} \times 10^{{{exponent}}}", rf"{mantissa}\cdot 10^{{{exponent}}}"]
    form = draw(st.sampled_from(forms))
    around = draw(
        st.sampled_from(["{}", "{}", "${}$", " {}. ", r"\text{{{}}}", "x = {}", r"\displaystyle {}"])
    )
    return around.format(form) if "\\" not in form or "text" not in around else form
