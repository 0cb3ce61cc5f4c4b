"""A Hugging Face model's config.json, read as JSON, value by value, each refused by name where it is wrong.

Importing transformers takes seconds, in each rank of a job, and nothing else in training needs it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lopd.errors import ConfigError
from megatron_lopd.files.reading import is_there, read_object

LIMIT = 16 << 20  # bytes: a config of a quantized model names its layers


@dataclass(frozen=True)
class ConfigJson:
    """The values of a config.json; one that is absent or null has the default, where there is one.

    `path` is the file, for messages; `raw` is its object, or one nested in it.
    """

    path: Path
    raw: Mapping[str, Any]

    @staticmethod
    def of(model_dir: str | Path) -> ConfigJson:
        """Read `model_dir`/config.json. Raises ConfigError where there is none, or it is no JSON object."""
        path = Path(model_dir) / "config.json"
        if not is_there(path):
            raise ConfigError(f"{path} is not there: give a Hugging Face checkpoint directory")
        return ConfigJson(path, read_object(path, limit=LIMIT, error=ConfigError))

    def count(self, key: str, default: int | None = None) -> int:
        """Raises ConfigError unless it is a whole number of at least 1."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._refusal(key, "a whole number of at least 1")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Raises ConfigError unless it is a number of at least 0."""
        value = self._value(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise self._refusal(key, "a number of at least 0")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """Raises ConfigError unless it is true or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._refusal(key, "true or false")
        return value

    def allow_only(self, options: Mapping[str, object]) -> None:
        """Raise ConfigError for a key of `options` with another value than that. Absent counts as that."""
        for option, supported in options.items():
            if self.raw.get(option) not in (None, supported):
                raise ConfigError(
                    f"{self.path}: {option}={self.raw[option]!r} is not supported, only {supported!r} is"
                )

    def _value(self, key: str, default: object) -> object:
        value = self.raw.get(key)
        return default if value is None else value

    def _refusal(self, key: str, wanted: str) -> ConfigError:
        found = repr(self.raw[key]) if key in self.raw else "missing"
        return ConfigError(f"{self.path}: {key} is {found}: it must be {wanted}")
