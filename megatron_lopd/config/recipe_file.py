"""A YAML file and dotted overrides to a Recipe or a Cluster."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from megatron_lopd.config.cluster import Cluster
from megatron_lopd.config.recipe import Recipe
from megatron_lopd.config.tree import build
from megatron_lopd.errors import ConfigError
from megatron_lopd.registry import allowing_user_code

T = TypeVar("T", Recipe, Cluster)


# What PyYAML raises: of its own, of a value like 2024-13-01 or a key like [a], and where all is too deep.
_NO_YAML = (yaml.YAMLError, ValueError, TypeError, KeyError, RecursionError)


class _RecipeLoader(yaml.SafeLoader):  # safe: no objects are built
    """YAML takes the last of two equal keys in silence; a recipe must not. And 1e-6 is a number here."""

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


# YAML 1.1 wants a point in it, and reads 1e-6 as text.
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `dotted.key=value` overrides.

    Raises ConfigError for a missing or malformed file, an unknown key, a value of the wrong type or
    out of range, each in one line naming the file and the dotted key.
    """
    raw = _read_yaml(Path(path))
    for override in overrides:
        _apply_override(raw, override)
    return _build(Recipe, raw, path)


def load_cluster(path: str | Path) -> Cluster:
    """Read a cluster file. Raises ConfigError as `load_recipe` does."""
    return _build(Cluster, _read_yaml(Path(path), "cluster file"), path)


def _build(cls: type[T], raw: dict[str, Any], path: str | Path) -> T:
    try:
        with allowing_user_code(raw.get("allow_user_code") is True):
            return build(cls, raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error.__cause__


def _read_yaml(path: Path, what: str = "recipe") -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such {what}: give the path of a YAML {what}")
    try:
        with path.open(encoding="utf-8") as stream:
            raw = _unshared(yaml.load(stream, _RecipeLoader))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except _NO_YAML as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
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
        value = _unshared(yaml.load(text, _RecipeLoader)) if text else None
    except _NO_YAML:
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
