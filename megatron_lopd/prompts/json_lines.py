"""A JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from megatron_lopd.errors import DataError
from megatron_lopd.prompts.reader import Reader


class JsonLinesReader(Reader):
    """JSON lines; those that are blank are left out, and counted."""

    name: ClassVar[str] = "jsonl"
    caption: ClassVar[str] = "a JSON object a line"
    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".json")

    def rows(self, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}:{number}", _object(f"{path}:{number}", line)


def _object(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON, at column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 100,000 brackets
        raise DataError(f"{where}: not JSON to be read: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be a JSON object, not {type(row).__name__}")
    return row
