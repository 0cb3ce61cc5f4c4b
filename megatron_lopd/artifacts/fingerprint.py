"""Who a model is: digests of what an engine would compute with. docs/concepts.md has what counts, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_lopd.artifacts.config_digest import config_digest
from megatron_lopd.artifacts.digest_cache import require_unchanged, stamps_of
from megatron_lopd.artifacts.model_files import model_files
from megatron_lopd.artifacts.voice_digest import (
    chat_template_digest,
    end_tokens_digest,
    is_loaded,
    tokenizer_digest,
)
from megatron_lopd.artifacts.weights_digest import is_hashed, weights_digest


@dataclass(frozen=True)
class Fingerprint:
    """Hex SHA-256 of each part of a model; "none" for a part that is not there."""

    weights: str
    config: str
    tokenizer: str
    chat_template: str
    end_tokens: str

    def parts(self) -> dict[str, str]:
        """{part: digest}, as kept in manifests."""
        return asdict(self)


def fingerprint_model(directory: str | Path, *, weights: bool = True) -> Fingerprint:
    """Fingerprint a Hugging Face checkpoint directory; without `weights`, a model that has none yet.

    Files are hashed anew but for what `digest_cache` allows. Raises DataError when a file is missing or
    malformed, or when loaders would read the directory differently.
    """
    files = model_files(directory, weights=weights)
    before = stamps_of(files.all)
    found = Fingerprint(
        weights=weights_digest(files) if weights else "none",
        config=config_digest(files),
        tokenizer=tokenizer_digest(files),
        chat_template=chat_template_digest(files),
        end_tokens=end_tokens_digest(files),
    )
    require_unchanged(before, "hashed")  # its parts are of one model
    return found


def is_fingerprinted(directory: Path) -> bool:
    """Whether hints spare all that takes `fingerprint_model` long. Raises as it does."""
    files = model_files(directory)
    return is_hashed(files) and is_loaded(files)
