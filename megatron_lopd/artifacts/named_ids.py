"""Which end tokens a model directory names by id, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_lopd.artifacts.model_files import CONFIG, GENERATION
from megatron_lopd.errors import ConfigError
from megatron_lopd.files.reading import is_file, read_object


def named_ids(directory: Path) -> tuple[Path, list[int]]:
    """What `eos_token_id` says, and where: in generation_config.json, or in config.json where it does not.

    ConfigError for what is no token id.
    """
    path = directory / GENERATION
    for path in (directory / GENERATION, directory / CONFIG):
        named = object_in(path).get("eos_token_id")
        ids = named if isinstance(named, list) else [named]
        for token in ids:
            if token is not None and (isinstance(token, bool) or not isinstance(token, int)):
                raise ConfigError(f"{path}: eos_token_id {token!r} is no token id: give a whole number")
        if wanted := [token for token in ids if token is not None]:
            return path, wanted
    return path, []


def object_in(path: Path) -> dict[str, Any]:
    """A JSON object's fields; none of a file that is not there."""
    return read_object(path, error=ConfigError) if is_file(path) else {}
