"""Numbers in words, as small ones are answered: up to a hundred, and those below nought."""

from __future__ import annotations

import re

SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"),
    *("twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
NUMBER_WORDS = (
    rf"(?:(?:minus|negative)\s)?(?:(?:{'|'.join(_TENS)})(?:[\s-](?:{'|'.join(SMALL[1:10])}))?"
    rf"|{'|'.join(SMALL)}|(?:an?|one)\shundred)"
)


def number(words: str) -> int:
    """What `words`, a match of `NUMBER_WORDS`, say."""
    parts = re.split(r"[\s-]", words.lower())
    value = 100 if parts[-1] == "hundred" else 0
    value += sum(SMALL.index(part) for part in parts if value < 100 and part in SMALL)
    value += sum(10 * _TENS.index(part) + 20 for part in parts if part in _TENS)
    return -value if parts[0] in ("minus", "negative") else value
