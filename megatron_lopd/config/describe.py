"""Every key of a recipe in words, for help, messages and the reference; what the doors add included."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from megatron_lopd.config.hints import bare, hints_of, range_text, type_name, without_none
from megatron_lopd.registry import Registry


@dataclass(frozen=True)
class KeyText:
    """One key. `kind` is its type and range; `default` as a recipe writes it, "empty" or "required".

    `door`: the registry whose names it takes, or None.
    """

    name: str
    kind: str
    default: str
    help: str
    operational: bool
    door: Registry[Any] | None = None


@dataclass(frozen=True)
class Section:
    """Keys that stand together. `place` is their dotted section, empty for the whole file's own.

    `help` is of the key that holds them. `thing`: of options, what has them, else None. `operational`: all of
    them are, whatever each says.
    """

    place: str
    kind: type
    help: str = ""
    thing: Any = None
    operational: bool = False

    @property
    def keys(self) -> list[KeyText]:
        """The keys that hold a value, in declared order, by their own names."""
        return list(_keys(self.kind))

    def dotted(self, name: str) -> str:
        """A key's name in the recipe."""
        return f"{self.place}.{name}" if self.place else name


def sections(kind: type) -> Iterator[Section]:
    """A config class's own keys and those of all that is in it; of a door, of all things known by now."""
    return _sections(Section("", kind))


def _sections(section: Section) -> Iterator[Section]:
    yield section
    hints = hints_of(section.kind)
    declared = {item.name: item for item in dataclasses.fields(section.kind)}
    for item in declared.values():
        if door_key := item.metadata.get("options_of"):
            for each in declared[door_key].metadata["door"].things().values():
                place, kind = section.dotted(each.name), each.Options
                yield from _sections(Section(place, kind, each.caption, each, section.operational))
            continue
        inner, name = without_none(hints[item.name]), section.dotted(item.name)
        if get_origin(inner) is dict:
            inner, name = get_args(inner)[1], f"{name}.<name>"
        if dataclasses.is_dataclass(inner):
            assert isinstance(inner, type)
            operational = section.operational or item.metadata["operational"]
            yield from _sections(Section(name, inner, item.metadata["help"], section.thing, operational))


def describe_keys(kind: type) -> Iterator[KeyText]:
    """Every key of a config class and all that is in it, by its dotted name."""
    for section in sections(kind):
        for key in section.keys:
            operational = key.operational or section.operational
            yield dataclasses.replace(key, name=section.dotted(key.name), operational=operational)


def nearest(name: str, prefix: str, here: Sequence[str], root: type) -> str:
    """What an unknown key of the section `prefix` may mean, as the end of a message.

    A key of that very name near by says where an option is; else a like name here, or that name anywhere.
    """
    known = [*(key.name for key in describe_keys(root)), *(section.place for section in sections(root))]
    elsewhere = [dotted for dotted in known if dotted.rpartition(".")[2] == name]
    nearby = max(elsewhere, key=lambda dotted: _shared(dotted, prefix), default="")
    if nearby and _shared(nearby, prefix):
        return f": did you mean {nearby}?"
    if close := difflib.get_close_matches(name, here, n=1, cutoff=0.5):
        return f": did you mean {prefix}{close[0]}?"
    if nearby:
        return f": did you mean {nearby}?"
    return f": known keys here are {', '.join(here)}" if here else ": it has no options"


def _shared(one: str, other: str) -> int:
    """How many sections two dotted keys have in common, from the outermost on."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _keys(kind: type) -> Iterator[KeyText]:
    hints = hints_of(kind)
    for item in dataclasses.fields(kind):
        if "options_of" in item.metadata or _holds_keys(hints[item.name]):
            continue
        door, operational = item.metadata["door"], item.metadata["operational"]
        kind_text = _kind(hints[item.name], door)
        yield KeyText(item.name, kind_text, _default(item), item.metadata["help"], operational, door)


def _holds_keys(hint: Any) -> bool:
    inner = without_none(hint)
    return dataclasses.is_dataclass(inner) or get_origin(inner) is dict


def _kind(hint: Any, door: Registry[Any] | None) -> str:
    if door is not None:
        kind = f"{door.what} or module:name"
        return f"list of {kind}" if get_origin(bare(hint)) is tuple else kind
    return ", ".join(filter(None, (type_name(hint), range_text(hint))))


def _default(item: dataclasses.Field[Any]) -> str:
    if item.default is dataclasses.MISSING:
        return "required"
    value = item.default
    if value is None or value == "" or value == ():
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
