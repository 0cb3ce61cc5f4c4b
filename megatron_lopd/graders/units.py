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
_PHYSICAL = (
    *("J joule joules", "N newton newtons", "W watt watts", "V volt volts", "A ampere amperes amp amps"),
    *("Pa pascal pascals", "Hz hertz", "C coulomb coulombs", "F farad farads", "T tesla teslas"),
    *("K kelvin kelvins", "mol mole moles", "eV electronvolt electronvolts", "g", "m", "s second seconds"),
)
_PREFIXES = {"": "", "k": "kilo", "M": "mega", "G": "giga", "m": "milli", "n": "nano", "μ": "micro"}
# By all their names, of which symbols alone have capitals that count: mJ, MJ.
_UNITS = {name.lower(): names.split()[0] for names in _KNOWN for name in names.split()} | {
    "a.m": "am",
    "p.m": "pm",
    "am": "am",
    "pm": "pm",
}
for _prefix, _word in _PREFIXES.items():
    for _symbol, *_names in map(str.split, _PHYSICAL):
        for _name in (f"{_prefix}{_symbol}", *(f"{_word}{each}" for each in _names)):
            _UNITS.setdefault(_name, f"{_prefix}{_symbol}")
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
    words = re.sub("^(平方|立方)", r"\1 ", match[1].replace("miles per hour", "mph").strip(". ")).split()
    if len(words) == 2 and words[0] in ("mod", "in"):
        return " ".join(words)
    power = _POWERS.get(words[0].strip(".").lower()) if words else None
    if power is not None:
        words.pop(0)
    if len(words) != 1:
        return None
    unit = _UNITS.get(words[0]) or _UNITS.get(words[0].lower())
    return None if unit is None else f"{unit}^{power or match[2] or 1}"
