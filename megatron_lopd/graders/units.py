"""Units and moduli that answers have: two that are known and differ make two answers of equal numbers."""

from __future__ import annotations

import re

_KNOWN = (
    "mm millimeter millimeters millimetre millimetres",
    "cm centimeter centimeters centimetre centimetres",
    "m meter meters metre metres",
    "km kilometer kilometers kilometre kilometres",
    "in inch inches",
    "ft foot feet",
    "yd yard yards",
    "mi mile miles",
    "mg milligram milligrams",
    "g gram grams",
    "kg kilogram kilograms",
    "lb lbs pound pounds",
    "oz ounce ounces",
    "s sec second seconds",
    "min minute minutes",
    "h hr hour hours",
    "day days",
    "week weeks",
    "month months",
    "year years",
    "cent cents",
    "dollar dollars",
    "euro euros",
    "yen",
    "rupee rupees",
    "degree degrees",
    "radian radians",
    "mph",
    "km/h",
    "m/s",
    "ft/s",
    "mL milliliter milliliters millilitre millilitres",
    "L liter liters litre litres",
)
_UNITS = {name.lower(): names.split()[0] for names in _KNOWN for name in names.split()}
CURRENCIES = {"$": "dollars", "€": "euros", "£": "pounds", "¥": "yen", "₹": "rupees"}
# A pattern of those that are no product of variables where nothing sets them as text.
NAMES = "|".join(
    sorted({name for names in _KNOWN for name in names.split() if len(name) > 1}, key=len, reverse=True)
)
_TRAILING = re.compile(
    r"\\(?:text|textrm|textbf|mathrm|mbox)\s*\{\s*([A-Za-z/ .]+?|mod \d+)\s*\}\s*(?:\^\s*\{?(\d)\}?)?$"
)


def unit_of(text: str) -> str | None:
    """The unit at an answer's end, by one name and with its power; None for none, or one not known."""
    match = _TRAILING.search(text)
    if match is None or match.start() == 0:
        return None
    words = match[1].lower().replace("miles per hour", "mph").strip(". ").split()
    if words[0] == "mod":
        return " ".join(words)
    power = {"square": "2", "sq": "2", "cubic": "3"}.get(words[0].strip("."))
    if power is not None:
        words.pop(0)
    if len(words) != 1 or words[0] not in _UNITS:
        return None
    return f"{_UNITS[words[0]]}^{power or match[2] or 1}"
