"""A prompt format in one file: comma-separated values, whose first line names the columns.

A recipe takes it by its import path:

    allow_user_code: true
    prompts:
      opd: {path: opd.csv, format: my_reader:CsvReader}
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_lopd.errors import DataError
from megatron_lopd.prompts import Reader


class CsvReader(Reader):
    """Rows as they come. Which columns are the prompt, its id and its answer is the same for all formats."""

    name = "csv"
    caption = "comma-separated values, the columns' names first"
    suffixes = (".csv",)

    def rows(self, path: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
        with path.open(encoding="utf-8", newline="") as stream:
            lines = csv.DictReader(stream, strict=True)
            try:
                for row in lines:
                    where = f"{path}:{lines.line_num}"
                    if None in row or None in row.values():
                        raise DataError(f"{where}: has not as many fields as there are columns")
                    yield where, row
            except csv.Error as error:
                raise DataError(f"{path}:{lines.line_num}: {error}") from None
