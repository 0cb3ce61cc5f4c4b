"""What reads a file of prompts, by its format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from megatron_lopd.errors import ConfigError
from megatron_lopd.registry import PROMPT_READERS


class Reader(ABC):
    """Rows of one format. What makes prompts of them is the same for all.

    `name` is what a recipe calls it, `caption` what it reads, in a line. `suffixes` are of the files that it
    reads without being named, each with its dot, in lower case. It is made without arguments.
    """

    name: ClassVar[str]
    caption: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def rows(self, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """("file:line", or whatever tells a reader where the row is; the row's fields by name), one by one.

        Values are text, numbers, and lists and mappings of them. Raises DataError, which begins with the same
        place, for a row that is malformed; OSError and UnicodeDecodeError are told by who asked.
        """


def reader_of(path: Path, format: str | None = None) -> Reader:
    """The reader of that name; for None, of the file's suffix. ConfigError when there is none."""
    if format is not None:
        named: type[Reader] = PROMPT_READERS[format]
        return named()
    known: dict[str, type[Reader]] = {
        suffix: kind for kind in PROMPT_READERS.things().values() for suffix in kind.suffixes
    }
    if path.suffix.lower() not in known:
        names = ", ".join(PROMPT_READERS.things())
        if path.is_dir():
            raise ConfigError(
                f"{path}: a directory: name a file in it, or its format (module:name of your own)"
            )
        raise ConfigError(
            f"{path}: nothing is known to read {path.suffix or 'a file without a suffix'}: use "
            f"{' or '.join(known)}, or name the file's format ({names}, or module:name of your own)"
        )
    return known[path.suffix.lower()]()
