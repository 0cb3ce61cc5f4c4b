"""YAML as a recipe may have it: text keys, each given once; bounded in depth and in what aliases make of it.

A value means here what it says: `true`, `null` and numbers are those, and what YAML 1.1 makes more of (dates,
`yes`, `010`, `1:30`) is text. Read from the parser's events, so that no depth and no alias costs more than
the text that asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from megatron_lopd.errors import ConfigError

DEPTH_LIMIT = 32
VALUES_LIMIT = 100_000  # aliases counted as what they stand for
DIGITS_LIMIT = 100  # characters of a number: no key wants more

_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)")
_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"([-+]?)\.(inf|Inf|INF|nan|NaN|NAN)")
_NO_KEY = object()


@dataclass
class _Level:
    """A mapping or list that is being read. `anchor`: what aliases call it. `key`: whose value comes next."""

    value: dict[str, Any] | list[Any]
    anchor: str | None
    key: Any = _NO_KEY


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text; None of an empty one. Raises ConfigError in one line that names `where`."""
    try:
        return _Reader(where).read(yaml.parse(text, yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


class _Reader:
    def __init__(self, where: str) -> None:
        self._where = where
        self._open: list[_Level] = []
        self._anchors: dict[str, Any] = {}
        self._result: Any = None
        self._count = self._documents = 0

    def read(self, events: Iterator[yaml.Event]) -> Any:
        """Take all of a stream's events."""
        for event in events:
            place = f"{self._where}:{event.start_mark.line + 1}" if event.start_mark else self._where
            if isinstance(event, yaml.DocumentStartEvent):
                self._documents += 1
                if self._documents > 1:
                    raise ConfigError(f"{place}: a second document begins: keep one")
            elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
                self._begin(event, place)
            elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
                ended = self._open.pop()
                self._add(ended.value, ended.anchor, place)
            elif isinstance(event, yaml.ScalarEvent):
                self._scalar(event, place)
            elif isinstance(event, yaml.AliasEvent):
                self._alias(event, place)
        return self._result

    def _begin(self, event: yaml.MappingStartEvent | yaml.SequenceStartEvent, place: str) -> None:
        self._require_no_tag(event.tag, place)
        if len(self._open) == DEPTH_LIMIT:
            raise ConfigError(f"{place}: more than {DEPTH_LIMIT} levels deep: no key is")
        if self._wants_key():
            raise ConfigError(f"{place}: a key that is no text: keys here are names")
        self._open.append(_Level({} if isinstance(event, yaml.MappingStartEvent) else [], event.anchor))

    def _scalar(self, event: yaml.ScalarEvent, place: str) -> None:
        text = event.value
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{place}: half of a surrogate pair, which is no character") from None
        if event.tag != "!":  # which quotes stand for
            self._require_no_tag(event.tag, place)
        if not self._wants_key():
            self._add(_plain(text, place) if event.implicit[0] else text, event.anchor, place)
            return
        holder = self._open[-1]
        if text == "<<" and event.implicit[0]:
            raise ConfigError(f"{place}: << (merging) is not taken: write the keys out")
        if text in holder.value:
            raise ConfigError(f"{place}: key {text!r} is given twice: keep one")
        holder.key = text

    def _alias(self, event: yaml.AliasEvent, place: str) -> None:
        if self._wants_key():
            raise ConfigError(f"{place}: *{event.anchor} as a key: write the name out")
        if any(each.anchor == event.anchor for each in self._open):
            raise ConfigError(f"{place}: *{event.anchor} stands within itself: write it out")
        if event.anchor not in self._anchors:
            raise ConfigError(f"{place}: *{event.anchor} is not defined before this line")
        self._add(self._copy(self._anchors[event.anchor], place), None, place)

    def _wants_key(self) -> bool:
        return bool(self._open) and isinstance(self._open[-1].value, dict) and self._open[-1].key is _NO_KEY

    def _require_no_tag(self, tag: str | None, place: str) -> None:
        if tag is not None:
            raise ConfigError(f"{place}: the tag {tag}: values here have none: drop it")

    def _add(self, value: Any, anchor: str | None, place: str) -> None:
        """Put a whole value where it belongs."""
        self._tally(place)
        if anchor is not None:
            self._anchors[anchor] = value
        if not self._open:
            self._result = value
            return
        holder = self._open[-1]
        if isinstance(holder.value, list):
            holder.value.append(value)
        else:
            holder.value[holder.key] = value
            holder.key = _NO_KEY

    def _copy(self, value: Any, place: str) -> Any:
        """Of what an alias stands for: an override of one section must not reach another."""
        if not isinstance(value, dict | list):
            return value
        self._tally(place)
        if isinstance(value, dict):
            return {name: self._copy(child, place) for name, child in value.items()}
        return [self._copy(child, place) for child in value]

    def _tally(self, place: str) -> None:
        self._count += 1
        if self._count > VALUES_LIMIT:
            raise ConfigError(
                f"{place}: above {VALUES_LIMIT:,} values, aliases written out: no recipe has so many"
            )


def _plain(text: str, place: str) -> Any:
    """What a scalar without quotes says."""
    if text in _WORDS:
        return _WORDS[text]
    if found := _NOT_FINITE.fullmatch(text):
        return float(found[1] + found[2])
    kind = int if _INT.fullmatch(text) else float if _FLOAT.fullmatch(text) else None
    if kind is None or (kind is float and re.fullmatch(r"[-+]?[0-9_]+", text)):  # 010: eight, or ten?
        return text
    if len(text) > DIGITS_LIMIT:
        raise ConfigError(f"{place}: a number of {len(text):,} characters: {text[:20]}...")
    return kind(text.replace("_", ""))
