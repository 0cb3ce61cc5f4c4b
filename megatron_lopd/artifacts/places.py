"""The places that libraries note in a model's files as where they read it from: nobody else's business."""

from __future__ import annotations

from pathlib import PureWindowsPath
from typing import Any


def without_places(value: Any, key: str = "") -> Any:
    """A JSON value with the last name alone of each place in it. `key`: what it stands under."""
    if isinstance(value, dict):
        return {name: without_places(each, name) for name, each in value.items()}
    if isinstance(value, list):
        return [without_places(each, key) for each in value]
    if isinstance(value, str) and key.endswith(("name_or_path", "_file")) and _is_place(value):
        return PureWindowsPath(value).name  # which parts it at slashes of both kinds
    return value


def _is_place(text: str) -> bool:
    """Whether it leads to somewhere on a machine. At a hub a name is one, or two with a slash between."""
    return text.startswith(("/", ".", "~")) or "\\" in text or text.count("/") > 1
