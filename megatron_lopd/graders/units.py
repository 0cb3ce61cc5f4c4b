"""Units, moduli and domains of answers: two that are known and differ make two answers of equal numbers."""

from __future__ import annotations

import re

_KNOWN = (
    "mm millimeter millimeters millimetre millimetres 毫米",
    "cm centimeter centimeters centimetre centimetres 厘米",
    "m meter meters metre metres 米",
    "km kilometer kilometers kilometre kilometres 千米 公里",
    "in inch inches",
    "ft foot feet",
    "yd yard yards",
    "mi mile miles",
    "mg milligram milligrams",
    "g gram grams 克",
    "kg kilogram kilograms 千克 公斤",
    "lb lbs pound pounds",
    "oz ounce ounces",
    "s sec second seconds 秒",
    "min minute minutes 分钟",
    "h hr hour hours 小时",
    "day days 天",
    "week weeks",
    "month months",
    "year years",
    "cent cents",
    "dollar dollars",
    "euro euros",
    "yen",
    "rupee rupees",
    "degree degrees deg",
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
_TRAILING = re.compile(r"\\(?:text|operatorname)\s*\{([^{}]*)\}\s*(?:\^\s*\{?(\d)\}?)?$")
_POWERS = {"square": "2", "sq": "2", "平方": "2", "cubic": "3", "立方": "3"}


def unit_of(text: str) -> str | None:
    """The unit at an answer's end, by one name and with its power; None for none, or one not known."""
    match = _TRAILING.search(text)
    if match is None or match.start() == 0:
        return None
    words = re.sub(
        "^(平方|立方)", r"\1 ", match[1].lower().replace("miles per hour", "mph").strip(". ")
    ).split()
    if len(words) == 2 and words[0] in ("mod", "in"):
        return " ".join(words)
    power = _POWERS.get(words[0].strip(".")) if words else None
    if power is not None:
        words.pop(0)
    if len(words) != 1 or words[0] not in _UNITS:
        return None
    return f"{_UNITS[words[0]]}^{power or match[2] or 1}"
