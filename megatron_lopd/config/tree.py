"""Plain dicts to config classes and back: an unknown key names the nearest, a wrong value its key."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

import msgspec

from megatron_lopd.config.describe import nearest
from megatron_lopd.config.hints import bare, hints_of, is_path, range_text, type_name, without_none
from megatron_lopd.config.keys import named_by
from megatron_lopd.errors import ConfigError
from megatron_lopd.registry import Registry, identity

T = TypeVar("T")
PATH_LIMIT = 4096  # characters: Linux takes no longer path


def build(cls: type[T], raw: Any) -> T:
    """A config class from what a file says. ConfigError naming the dotted key, in one line."""
    return _Builder(cls).section(cls, raw, "")


def to_plain(config: Any) -> Any:
    """A config as plain dicts, lists and scalars, in declared order, as a recipe has them."""
    return _plain(config, all_keys=True)


def deciding(config: Any) -> dict[str, Any]:
    """`to_plain` without the operational keys: what decides the output of a stage.

    A thing of a user's is told by its `registry.identity`, so that its code decides too.
    """
    plain: dict[str, Any] = _plain(config, all_keys=False)
    return plain


def _plain(value: Any, all_keys: bool) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each, all_keys) for name, each in value.items()}
    if isinstance(value, tuple):
        return list(value)
    if not dataclasses.is_dataclass(value):
        return value
    plain: dict[str, Any] = {}
    for item in dataclasses.fields(value):
        each = getattr(value, item.name)
        if "options_of" in item.metadata:
            if options := _plain(each, all_keys):
                plain[named_by(value, item.metadata["options_of"]).name] = options
        elif all_keys or not item.metadata["operational"]:
            is_named = item.metadata["door"] is not None and each and not all_keys
            plain[item.name] = identity(each) if is_named else _plain(each, all_keys)
    return plain


class _Builder:
    """`root` is the whole file's class, for hints at keys elsewhere in it."""

    def __init__(self, root: type) -> None:
        self._root = root

    def section(self, cls: type[T], raw: Any, prefix: str) -> T:
        """One section as its class; `prefix` is its dotted key with a dot, empty for the whole file."""
        if not isinstance(raw, dict):
            raise ConfigError(f"{prefix.rstrip('.')}: expected keys and values, not {raw!r}")
        items = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
        values: dict[str, Any] = {}
        here = list(items)
        for place in [name for name, item in items.items() if "options_of" in item.metadata]:
            door_key = items[items.pop(place).metadata["options_of"]]
            here.remove(place)
            thing = _named_thing(door_key, raw, prefix, items)
            given = raw.get(thing.name)
            options = {} if given is None else given
            values[place] = self.section(thing.Options, options, f"{prefix}{thing.name}.")
            raw = {name: value for name, value in raw.items() if name != thing.name}
            here.append(thing.name)
        for name in raw:
            if name not in items:
                hint = nearest(str(name), prefix, here, self._root)
                raise ConfigError(f"unknown key {prefix}{name}{hint}")
        hints = hints_of(cast(type, cls))
        for name, value in raw.items():
            values[name] = self._value(hints[name], value, f"{prefix}{name}")
            if door := items[name].metadata["door"]:
                _require_known(door, values[name], f"{prefix}{name}")
        for name, item in items.items():
            required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
            if required and name not in values:
                raise ConfigError(f"missing key {prefix}{name}: {item.metadata['help']}")
        return cls(**values)

    def _value(self, hint: Any, value: Any, name: str) -> Any:
        inner = without_none(hint)
        if value is None:
            if inner is not hint:
                return None
            raise ConfigError(f"{name}: expected {type_name(hint)}, got nothing")
        if dataclasses.is_dataclass(inner):
            assert isinstance(inner, type)
            return self.section(inner, value, f"{name}.")
        if get_origin(inner) is dict:
            return self._named_sections(get_args(inner)[1], value, name)
        if get_origin(inner) is tuple and isinstance(value, list):
            kind = get_args(inner)[0]
            return tuple(self._value(kind, each, f"{name}[{index}]") for index, each in enumerate(value))
        return _scalar(inner, value, name)

    def _named_sections(self, cls: type[T], value: Any, name: str) -> dict[str, T]:
        """Sections by name. One section given bare is the only one, under the name of its own key."""
        known = {item.name for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
        # A set whose keys are all forgotten is nothing, and a set all the same.
        sections = isinstance(value, dict) and [isinstance(each, dict | None) for each in value.values()]
        if isinstance(value, dict) and (not sections or any(sections)):
            plain = {each for each, section in value.items() if not isinstance(section, dict)}
            if not plain & known:  # so a set that is no section is told by its own name
                return {
                    str(each): self.section(cls, section, f"{name}.{each}.")
                    for each, section in value.items()
                }
        return {name.rpartition(".")[2]: self.section(cls, value, f"{name}.")}


def _named_thing(
    key: dataclasses.Field[Any], raw: dict[str, Any], prefix: str, items: Mapping[str, Any]
) -> Any:
    """What the door's `key` names, whose options are in a section of its name.

    Raises ConfigError for a section of another thing, or one that would be taken for one of `items`.
    """
    door, dotted = key.metadata["door"], f"{prefix}{key.name}"
    asked = _scalar(str, raw.get(key.name, key.default), dotted)
    _require_known(door, asked, dotted)
    thing = door[asked]
    if thing.name in items:
        raise ConfigError(f"{dotted}: {thing.name} is a key here: give your {door.what} another name")
    for other in door.things().values():
        if other is not thing and other.name in raw and other.name not in items:
            raise ConfigError(
                f"{prefix}{other.name} has options of another {door.what} than {dotted}={asked}: drop it, "
                f"or set {dotted}={other.name}"
            )
    return thing


def _require_known(door: Registry[Any], given: Any, name: str) -> None:
    """Raise ConfigError unless the door knows what a key has: a name, several, or nothing where it may."""
    for each in given if isinstance(given, tuple) else [given] if given else []:
        try:
            door[each]
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error.__cause__


def _scalar(hint: Any, value: Any, name: str) -> Any:
    kind = bare(hint)
    if kind is int and isinstance(value, float) and value.is_integer():  # 1e3
        value = int(value)
    try:
        result = msgspec.convert(value, hint)
    except msgspec.ValidationError:
        if get_origin(kind) is Literal:
            choices = [str(choice) for choice in get_args(kind)]
            close = difflib.get_close_matches(str(value), choices, n=1)
            meant = f": did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{name}: {value!r} is not one of {', '.join(choices)}{meant}") from None
        if _is_of(kind, value):
            raise ConfigError(f"{name} must be {range_text(hint, value)}, not {value!r}") from None
        raise ConfigError(f"{name}: expected {type_name(hint)}, got {value!r}") from None
    if isinstance(result, float) and not math.isfinite(result):
        raise ConfigError(f"{name}: expected a finite float, got {value!r}")
    return _expanded(result, name) if is_path(hint) else result


def _expanded(path: str, name: str) -> str:
    """With the home directory for `~` and the environment's for `$NAME` and `${NAME}`, as in a shell."""
    if len(path) > PATH_LIMIT:
        raise ConfigError(f"{name}: a path of {len(path):,} characters: {path[:20]}...")
    whole = os.path.expanduser(path)
    if whole.startswith("~"):
        raise ConfigError(f"{name}: {path!r}: there is no such home directory: write the path out")
    if "}" not in whole[whole.rfind("${") :] and "${" in whole:
        raise ConfigError(f"{name}: {path!r}: a ${{ is not closed: write ${{NAME}}")
    for braced, plain in re.findall(r"\$(?:\{([^}]*)\}|(\w+))", whole):
        if (braced or plain) not in os.environ:
            raise ConfigError(
                f"{name}: {path!r}: ${braced or plain} is not set in the environment: set it, or write the "
                "path out"
            )
    return os.path.expandvars(whole)


def _is_of(kind: Any, value: Any) -> bool:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True
