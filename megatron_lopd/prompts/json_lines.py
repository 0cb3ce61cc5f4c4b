"""A JSON object a line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from megatron_lopd.errors import DataError
from megatron_lopd.files.reading import parse_json, read_lines
from megatron_lopd.prompts.reader import Reader


class JsonLinesReader(Reader):
    """JSON lines; those that are blank are left out, and counted."""

    name: ClassVar[str] = "jsonl"
    caption: ClassVar[str] = "a JSON object a line"
    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".json")

    def rows(self, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for number, line in read_lines(path):
            if line.strip():
                where = f"{path}:{number}"
                if number == 1 and line.lstrip().startswith("["):
                    raise DataError(
                        f"{where}: must be a JSON object a line, not one list of them: write each on a line "
                        "of its own (jq -c '.[]' does)"
                    )
                row = parse_json(line.rstrip(), where)
                if not isinstance(row, dict):
                    raise DataError(f"{where}: must be a JSON object, not {type(row).__name__}")
                yield where, row
