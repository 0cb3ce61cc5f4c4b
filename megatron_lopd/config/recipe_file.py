"""Strict YAML to a Recipe: an unknown key is an error naming the nearest, a wrong type says which."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from megatron_lopd.config.cluster import Cluster
from megatron_lopd.config.recipe import Recipe
from megatron_lopd.errors import ConfigError
from megatron_lopd.registry import LAUNCHERS, allowing_user_code

T = TypeVar("T")


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML takes the last of two equal keys in silence; a recipe must not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            name = self.construct_object(key_node, deep=True)
            if name in seen:
                raise ConfigError(
                    f"{key_node.start_mark.name}:{key_node.start_mark.line + 1}: key {name!r} is given "
                    "twice: keep one"
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `dotted.key=value` overrides.

    Raises ConfigError for a missing or malformed file, an unknown key, a value of the wrong type or
    out of range, each in one line naming the file and the dotted key.
    """
    raw = _unshared(_read_yaml(Path(path)))
    for override in overrides:
        _apply_override(raw, override)
    try:
        return _build(Recipe, raw, "")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def load_cluster(path: str | Path) -> Cluster:
    """Read a cluster file. Raises ConfigError as `load_recipe` does."""
    raw = _unshared(_read_yaml(Path(path), "cluster file"))
    try:
        with allowing_user_code(raw.get("allow_user_code") is True):
            cluster = _build(Cluster, raw, "")
            LAUNCHERS[cluster.launcher]  # ConfigError where there is none
        return cluster
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def to_plain(config: Any) -> Any:
    """A dataclass tree as plain dicts, lists and scalars, in declared order (for YAML and JSON)."""
    return dataclasses.asdict(config)


def deciding(config: Any) -> dict[str, Any]:
    """`to_plain` without the operational keys: what decides the output of a stage."""
    plain = {}
    for item in dataclasses.fields(config):
        if not item.metadata["operational"]:
            value = getattr(config, item.name)
            plain[item.name] = deciding(value) if dataclasses.is_dataclass(value) else value
    return plain


def describe_keys(cls: type = Recipe, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (dotted key, type and default, help with unit) of every leaf of the recipe."""
    hints = get_type_hints(cls)
    for item in dataclasses.fields(cls):
        inner = _strip_optional(hints[item.name])
        if get_origin(inner) is dict:
            yield f"{prefix}{item.name}.<name>", "one section, or several by name", item.metadata["help"]
            inner = get_args(inner)[1]
        if dataclasses.is_dataclass(inner):
            assert isinstance(inner, type)
            yield from describe_keys(inner, f"{prefix}{item.name}.")
            continue
        default = "required" if item.default is dataclasses.MISSING else f"default {item.default!r}"
        yield f"{prefix}{item.name}", f"{_type_name(hints[item.name])}, {default}", item.metadata["help"]


def _read_yaml(path: Path, what: str = "recipe") -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such {what}: give the path of a YAML {what}")
    try:
        with path.open(encoding="utf-8") as stream:
            raw = yaml.load(stream, _UniqueKeyLoader)  # a SafeLoader: no objects are built
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a {what} is a mapping of keys to values, not {type(raw).__name__}")
    return raw


def _unshared(value: Any) -> Any:
    """A copy in which YAML's aliases are copies too: an override of one section must not reach another."""
    if isinstance(value, dict):
        return {name: _unshared(child) for name, child in value.items()}
    return [_unshared(child) for child in value] if isinstance(value, list) else value


def _apply_override(raw: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(
            f"override {override!r}: write it as dotted.key=value, such as train.optimizer.lr=1e-6"
        )
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: quote it") from None
    node = raw
    *parents, leaf = name.split(".")
    for depth, parent in enumerate(parents):
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(
                f"override {override!r}: {'.'.join(parents[: depth + 1])} holds a value, not keys"
            )
        node = child
    node[leaf] = value


def _build(cls: type[T], raw: Any, prefix: str) -> T:
    if not isinstance(raw, dict):
        raise ConfigError(f"{prefix.rstrip('.')}: expected keys and values, not {raw!r}")
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in raw:
        if name not in fields:
            raise ConfigError(f"unknown key {prefix}{name}{_nearest(str(name), prefix, fields)}")
    hints = get_type_hints(cls)
    values = {name: _convert(hints[name], value, f"{prefix}{name}") for name, value in raw.items()}
    for name, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"missing key {prefix}{name}: {item.metadata['help']}")
    return cls(**values)


def _nearest(name: str, prefix: str, fields: dict[str, Any]) -> str:
    close = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
    if close:
        return f": did you mean {prefix}{close[0]}?"
    elsewhere = [dotted for dotted, _, _ in describe_keys() if dotted.rsplit(".", 1)[-1] == name]
    if elsewhere:
        return f": did you mean {elsewhere[0]}?"
    return f": known keys here are {', '.join(fields)}"


def _convert(hint: Any, value: Any, name: str) -> Any:
    """`value` as `hint`, or ConfigError. YAML 1.1 reads 1e-6 as text, so numbers in text are taken."""
    inner = _strip_optional(hint)
    if value is None:
        if inner is not hint:
            return None
        raise ConfigError(f"{name}: expected {_type_name(hint)}, got nothing")
    if dataclasses.is_dataclass(inner):
        assert isinstance(inner, type)
        return _build(inner, value, f"{name}.")
    if get_origin(inner) is dict:
        return _build_named(get_args(inner)[1], value, name)
    if get_origin(inner) is Literal:
        choices = get_args(inner)
        if value not in choices:
            near = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1)
            hint_text = f": did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{name}: {value!r} is not one of {', '.join(map(str, choices))}{hint_text}")
        return value
    if get_origin(inner) is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{name}: expected a list, got {value!r}")
        return tuple(_convert(get_args(inner)[0], item, f"{name}[{n}]") for n, item in enumerate(value))
    converted = _scalar(inner, value)
    if converted is None:
        raise ConfigError(f"{name}: expected {_type_name(hint)}, got {value!r}")
    return converted


def _build_named(cls: type[T], value: Any, name: str) -> dict[str, T]:
    """Sections by name. One section given bare is the only one, under the name of its own key."""
    if isinstance(value, dict) and all(isinstance(section, dict) for section in value.values()):
        return {str(each): _build(cls, section, f"{name}.{each}.") for each, section in value.items()}
    return {name.rpartition(".")[2]: _build(cls, value, f"{name}.")}


def _scalar(kind: Any, value: Any) -> Any:
    if kind is bool:
        return value if isinstance(value, bool) else None
    if kind is str:
        return value if isinstance(value, str) else None
    if isinstance(value, bool):
        return None
    if kind is float and isinstance(value, int | float | str):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            return None
        return number if math.isfinite(number) else None
    if kind is int and isinstance(value, int):
        return value
    return None


def _strip_optional(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        (inner,) = [arg for arg in get_args(hint) if arg is not type(None)]
        return inner
    return hint


def _type_name(hint: Any) -> str:
    inner = _strip_optional(hint)
    if get_origin(inner) is Literal:
        return " | ".join(str(choice) for choice in get_args(inner))
    return str(inner.__name__)
