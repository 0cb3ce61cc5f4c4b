"""Prompts as a model reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lopd.config import Sampling, TrainingConfig
from megatron_lopd.errors import ConfigError
from megatron_lopd.families.architecture import read_architecture
from megatron_lopd.prompts.prompt import Prompt

if TYPE_CHECKING:
    from megatron_lopd.data.chat import Chat, Tokens


@dataclass(frozen=True)
class EncodedPrompts:
    """`tokens`: ids of each prompt, int32 [P]. `end_tokens`: the model's ids that end a response.

    `notes`: what is to be known of the prompts, a line each.
    """

    prompts: Sequence[Prompt]
    tokens: Sequence[Tokens]
    end_tokens: frozenset[int]
    notes: Sequence[str] = ()


def encode(
    prompts: Sequence[Prompt], model_dir: Path, max_tokens: int, trust_remote_code: bool
) -> EncodedPrompts:
    """By the model's tokenizer and chat template. Raises DataError as `Chat.prompts`, naming the first.

    Raises ConfigError where the model cannot be talked to.
    """
    from megatron_lopd.data.chat import Chat

    chat = Chat(str(model_dir), trust_remote_code)
    tokens = chat.prompts([(prompt.described, prompt.messages) for prompt in prompts], max_tokens)
    notes = [*read_notes(chat), *_alike_note(prompts, tokens)]
    return EncodedPrompts(prompts, tokens, chat.end_tokens, notes)


def read_notes(chat: Chat) -> list[str]:
    """What is to be known of the prompts that it has read: control tokens in them, text that it lost."""
    notes = []
    if chat.spelled:
        notes.append(f"{chat.spelled:,} of them spell out control tokens, which are read as text")
    if lost := chat.unwritten:
        notes.append(
            f"{len(lost):,} of them have text that the tokenizer has no token for, and the model does not "
            f"see it: the first is {lost[0]}"
        )
    return notes


def _alike_note(prompts: Sequence[Prompt], tokens: Sequence[Tokens]) -> list[str]:
    """That some are not the same, and read the same."""
    first: dict[bytes, Prompt] = {}
    alike = [
        (prompt, first[read])
        for prompt, read in ((prompt, each.tobytes()) for prompt, each in zip(prompts, tokens, strict=True))
        if first.setdefault(read, prompt).messages != prompt.messages
    ]
    if not alike:
        return []
    one, other = alike[0]
    return [f"{len(alike):,} of them read just as another does: {one.described} as {other.described}"]


def longest_prompt(model_dir: Path, sampling: Sampling, training: TrainingConfig | None, section: str) -> int:
    """Tokens a prompt may have, so that it and its response fit the model and, if trained on, a micro-batch.

    `section` of the recipe is the sampling's. Raises ConfigError when that leaves none.
    """
    limits = {"the model's max_position_embeddings": read_architecture(model_dir).max_positions}
    if training is not None:
        limits[f"{training.section}.micro_batch_tokens"] = training.micro_batch_tokens
    name = min(limits, key=lambda each: limits[each])
    left = limits[name] - sampling.max_new_tokens
    if left < 1:
        raise ConfigError(
            f"{section}.sampling.max_new_tokens={sampling.max_new_tokens} leaves no room for a prompt "
            f"within {name}={limits[name]}: lower the one or raise the other"
        )
    return left
