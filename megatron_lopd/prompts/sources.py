"""The prompts of a recipe: from a file, or made by a task."""

from __future__ import annotations

from pathlib import Path

from megatron_lopd.artifacts.files import canonical_json, sha256_bytes
from megatron_lopd.artifacts.manifest import Parent
from megatron_lopd.config import PromptSource
from megatron_lopd.errors import ConfigError
from megatron_lopd.prompts.prompt import Prompt
from megatron_lopd.prompts.rows import read_prompts
from megatron_lopd.registry import TASKS, identity


def load_prompts(source: PromptSource, split: str, seed: int) -> list[Prompt]:
    """The prompts of `source`, in order. `split` ("sft", "opd", "eval") and `seed` matter to tasks.

    Raises ConfigError for an unknown task or format, DataError for a file that is missing, empty, malformed
    (naming the line) or shorter than `source.count`.
    """
    try:
        if source.task is not None:
            assert source.count is not None  # PromptSource requires it of a task
            return list(TASKS[source.task]().prompts(source.count, seed, split))
        assert source.path is not None  # PromptSource requires one of the two
        return read_prompts(
            Path(source.path),
            source.count,
            source.prompt_field,
            source.answer_field,
            source.suffix,
            format=source.format,
            extra_fields=source.extra_fields,
        )
    except ConfigError as error:
        raise ConfigError(f"prompts.{split}: {error}") from None


def prompts_parent(source: PromptSource, prompts: list[Prompt]) -> Parent:
    """The prompts as an artifact's parent: a digest of what they say, wherever they came from.

    And of the code that made them, where that is the user's own.
    """
    content = [
        [prompt.id, list(prompt.messages), prompt.answer, *([prompt.extra] if prompt.extra else [])]
        for prompt in prompts
    ]
    digests = {"sha256": sha256_bytes(canonical_json(content))}
    maker = source.task or source.format or ""
    if ":" in maker:
        digests[f"source of {maker}"] = identity(maker).rpartition(":")[2]
    where = source.path if source.path is not None else f"task {source.task}"
    return Parent("file", where, digests)
