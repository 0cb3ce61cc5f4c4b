"""The prompts of a recipe: from a JSONL file, or made by a built-in task."""

from __future__ import annotations

from pathlib import Path

from megatron_lopd.artifacts.files import canonical_json, sha256_bytes
from megatron_lopd.artifacts.manifest import Parent
from megatron_lopd.config import PromptSource
from megatron_lopd.errors import ConfigError
from megatron_lopd.prompts import arithmetic
from megatron_lopd.prompts.prompt import Prompt, read_prompts


def load_prompts(source: PromptSource, split: str, seed: int) -> list[Prompt]:
    """The prompts of `source`, in order. `split` ("sft", "opd", "eval") and `seed` matter to tasks.

    Raises ConfigError for an unknown task, DataError for a file that is missing, empty, malformed
    (naming the line) or shorter than `source.count`.
    """
    if source.task is not None:
        if source.task != "arithmetic":
            raise ConfigError(
                f"prompts.{split}.task: unknown task {source.task!r}: use arithmetic, or give a path"
            )
        assert source.count is not None  # PromptSource requires it of a task
        problems = arithmetic.problems(source.count, seed, split)
        return [Prompt(p.id, ({"role": "user", "content": p.prompt},), p.answer) for p in problems]
    assert source.path is not None  # PromptSource requires one of the two
    return read_prompts(
        Path(source.path), source.count, source.prompt_field, source.answer_field, source.suffix
    )


def prompts_parent(source: PromptSource, prompts: list[Prompt]) -> Parent:
    """The prompts as an artifact's parent: a digest of what they say, wherever they came from."""
    content = [[prompt.id, list(prompt.messages), prompt.answer] for prompt in prompts]
    where = source.path if source.path is not None else f"task {source.task}"
    return Parent("file", where, {"sha256": sha256_bytes(canonical_json(content))})
