"""The keys of a recipe as text for a terminal: each section once, and each door with what is behind it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_lopd.config.describe import KeyText, Section, sections
from megatron_lopd.config.recipe import Recipe

WIDTH = 100


@dataclass(frozen=True)
class Group:
    """Keys that are alike at several places of a recipe: `sections` are those places."""

    sections: tuple[Section, ...]
    keys: tuple[KeyText, ...]

    @property
    def title(self) -> str:
        """The places; empty for the recipe's own keys."""
        return ", ".join(section.place for section in self.sections)


def groups(kind: type = Recipe, wanted: Sequence[str] | None = None) -> list[Group]:
    """The keys in and below the `wanted` sections (or keys) of a config class; all of them without."""
    found: dict[object, list[Section]] = {}
    shown: dict[object, tuple[KeyText, ...]] = {}
    for section in sections(kind):
        keys = tuple(
            key for key in section.keys if wanted is None or _is_within(section.dotted(key.name), wanted)
        )
        alike = (section.kind, id(section.thing), keys)
        if keys:
            found.setdefault(alike, []).append(section)
            shown[alike] = keys
    return [Group(tuple(places), shown[alike]) for alike, places in found.items()]


def key_help(wanted: Sequence[str] | None = None) -> str:
    """What `--help` says of those keys."""
    return "\n".join(line for group in groups(Recipe, wanted) for line in _lines(group))


def _is_within(name: str, wanted: Sequence[str]) -> bool:
    return any(name == section or name.startswith(f"{section}.") for section in wanted)


def _lines(group: Group) -> Iterator[str]:
    if group.title:
        yield ""
        yield from textwrap.wrap(f"{group.title}:", WIDTH, subsequent_indent="  ")
    for key in group.keys:
        default = key.default if key.default in ("required", "empty") else f"default {key.default}"
        yield f"  {key.name} ({key.kind}; {default})"
        yield from _indented(key.help, 6)
        for name, caption in choices(key):
            yield from _indented(f"{name}: {caption}", 8)


def choices(key: KeyText) -> Iterator[tuple[str, str]]:
    """(name, what it is) of all that is behind a key's door by now; a user's by the import path."""
    if key.door is not None:
        for name, thing in key.door.things().items():
            yield key.door.import_path(name) or name, thing.caption


def _indented(text: str, spaces: int) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * spaces, subsequent_indent=" " * spaces)
