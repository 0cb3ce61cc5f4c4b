"""A YAML file and dotted overrides to a Recipe or a Cluster."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from megatron_lopd.config.cluster import Cluster
from megatron_lopd.config.recipe import Recipe
from megatron_lopd.config.strict_yaml import parse_yaml
from megatron_lopd.config.tree import build
from megatron_lopd.errors import ConfigError
from megatron_lopd.files.reading import read_text
from megatron_lopd.registry import allowing_user_code

T = TypeVar("T", Recipe, Cluster)

SIZE_LIMIT = 1 << 20  # bytes of a recipe, which is written by hand


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
    if not os.path.exists(path):  # unlike Path's, of any name
        raise ConfigError(f"{path}: no such {what}: give the path of a YAML {what}")
    if os.path.isdir(path):  # of a run, most likely
        raise ConfigError(f"{path}: a directory, not a {what}: give the path of a YAML {what}")
    raw = parse_yaml(read_text(path, limit=SIZE_LIMIT, error=ConfigError), str(path))
    if raw is None:
        raise ConfigError(f"{path}: the file is empty: a {what} is a mapping of keys to values")
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a {what} is a mapping of keys to values, not {type(raw).__name__}")
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(
            f"override {override!r}: write it as dotted.key=value, such as train.optimizer.lr=1e-6"
        )
    value = parse_yaml(text, f"override {override!r}")
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
