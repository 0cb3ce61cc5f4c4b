"""The tokens that end a response: what a model directory says of them, and writing it down in full.

Libraries look for them in different files: generation_config.json, config.json where that is missing, and the
tokenizer. A run stops at all that its model names; what it makes says them in each of those files.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron_lopd.artifacts.model_files import CONFIG, GENERATION
from megatron_lopd.artifacts.named_ids import named_ids, object_in
from megatron_lopd.data.vocabulary import token_ids
from megatron_lopd.errors import ConfigError
from megatron_lopd.files.writing import atomic_write_text


def end_tokens(model_dir: str | Path, tokenizer: Any) -> frozenset[int]:
    """Ids that end a response: those of `named_ids`, and the tokenizer's end token.

    Raises ConfigError when none is named (sampling would never stop), and for an id without a token.
    """
    path, ids = named_ids(Path(model_dir))
    known = set(token_ids(tokenizer).tolist())
    for token in ids:
        if token not in known:
            raise ConfigError(
                f"{path}: eos_token_id {token!r} is no token id: give one that the tokenizer has"
            )
    found = frozenset(ids) | ({tokenizer.eos_token_id} - {None})
    if not found:
        raise ConfigError(
            f"{model_dir}: no end token: set eos_token in tokenizer_config.json or eos_token_id in "
            "generation_config.json"
        )
    return frozenset(found)


def write_end_tokens(directory: Path, ids: Collection[int]) -> None:
    """Have generation_config.json, and config.json where there is one, name just `ids`.

    What names them already is left as it is.
    """
    for path in (directory / GENERATION, directory / CONFIG):
        if path.name == CONFIG and not path.is_file():
            continue
        content = object_in(path)
        named = content.get("eos_token_id")
        if set(named if isinstance(named, list) else [named]) != set(ids):
            content["eos_token_id"] = min(ids) if len(ids) == 1 else sorted(ids)
            atomic_write_text(path, json.dumps(content, indent=2) + "\n")
