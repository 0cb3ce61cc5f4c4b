"""A model directory's tokenizer, and which of a model's rows it has a token for.

The rows of an embedding are often padded beyond the tokenizer, of two models with one tokenizer each to a
number of its own (Qwen2.5: 151,665 tokens, 151,936 rows in 1.5B and 152,064 in 32B), and ids can have holes.
No text has such an id in it, and the other model need not have the row: so none is ever drawn, and none is
among a teacher's kept likeliest tokens. What a model gives them belongs to the tail; log-probs stay those of
its whole softmax.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_lopd.artifacts.model_files import CONFIG, voice_files
from megatron_lopd.errors import ConfigError, reason_of
from megatron_lopd.files.reading import is_directory, is_there, read_bytes

# What a tokenizer is loaded from, whichever kind it is.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")


def load_tokenizer(model_dir: str | Path, trust_remote_code: bool = False) -> Any:
    """The directory's tokenizer. ConfigError when it has none that loads, DataError as `voice_files`."""
    root = Path(model_dir)
    if not is_directory(root):
        raise ConfigError(f"{model_dir}: no such model directory")
    for path in (root / CONFIG, *voice_files(root)):
        if is_there(path):
            read_bytes(path)  # its loader names no file that it cannot read, and reads without a limit
    from transformers import AutoTokenizer  # takes seconds, and training's ranks need none

    try:
        return AutoTokenizer.from_pretrained(
            model_dir, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # whatever a foreign file has the loader stumble over
        raise ConfigError(f"{model_dir}: its tokenizer does not load: {reason_of(error)}") from error


def token_ids(tokenizer: Any) -> NDArray[np.int64]:
    """The ids that have a token, in order: int64 [n]."""
    return np.unique(np.fromiter(tokenizer.get_vocab().values(), dtype=np.int64))


def ids_without_token(model_dir: str | Path, rows: int, trust_remote_code: bool) -> NDArray[np.int64]:
    """The ids below `rows` that the directory's tokenizer has no token for, in order: int64 [n].

    None of a directory without a tokenizer: nothing tells its rows apart. ConfigError for one that does not
    load.
    """
    root = Path(model_dir)
    if not any(any(root.glob(name)) for name in TOKENIZER_FILES):
        return np.empty(0, dtype=np.int64)
    spoken = token_ids(load_tokenizer(model_dir, trust_remote_code))
    return np.setdiff1d(np.arange(rows), spoken)
