"""Every key of a recipe in words, for help, messages and the reference; what the doors add included."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from megatron_lopd.config.hints import bare, hints_of, range_text, type_name, without_none
from megatron_lopd.config.keys import options_class
from megatron_lopd.registry import Registry


@dataclass(frozen=True)
class KeyText:
    """One key. `name` is dotted; `kind` its type and range; `default` as written in a recipe, or "required".

    `door`: the registry whose names it takes, or None. `owner`: of an option, the thing that has it.
    """

    name: str
    kind: str
    default: str
    help: str
    operational: bool
    door: Registry[Any] | None = None
    owner: str = ""


def describe_keys(cls: type, prefix: str = "", owner: str = "") -> Iterator[KeyText]:
    """Every key of a config class, in declared order; of a door, the options of all things known by now."""
    hints = hints_of(cls)
    declared = {item.name: item for item in dataclasses.fields(cls)}
    for item in declared.values():
        if door_key := item.metadata.get("options_of"):
            for thing in declared[door_key].metadata["door"].things().values():
                yield from describe_keys(options_class(thing), f"{prefix}{thing.name}.", thing.name)
            continue
        name, text = f"{prefix}{item.name}", item.metadata["help"]
        inner, operational = without_none(hints[item.name]), item.metadata["operational"]
        if get_origin(inner) is dict:
            yield KeyText(f"{name}.<name>", "one section, or several by name", "none", text, operational)
            name, inner = f"{name}.<name>", get_args(inner)[1]
        if dataclasses.is_dataclass(inner):
            assert isinstance(inner, type)
            yield from describe_keys(inner, f"{name}.", owner)
            continue
        door = item.metadata["door"]
        yield KeyText(name, _kind(hints[item.name], door), _default(item), text, operational, door, owner)


def nearest(name: str, prefix: str, here: Sequence[str], root: type) -> str:
    """What an unknown key of the section `prefix` may mean, as the end of a message.

    A key of that very name near by says where an option is; else a like name here, or that name anywhere.
    """
    elsewhere = [key.name for key in describe_keys(root) if key.name.rpartition(".")[2] == name]
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
