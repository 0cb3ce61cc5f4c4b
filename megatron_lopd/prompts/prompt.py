"""A prompt, or a conversation to fine-tune on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Prompt:
    """Chat messages under an id that is unique in its source; `answer` is what a grader needs, if any.

    In a prompt the last message is the user's; in a conversation to fine-tune on, the assistant's. `extra`
    has the further fields of its row that extra_fields names, for a grader that needs more than an answer.
    `where` it is from, "file:line", is for messages.
    """

    id: str
    messages: tuple[Message, ...]
    answer: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)

    @property
    def described(self) -> str:
        """It in a message."""
        return f"{self.where}: prompt {self.id}" if self.where else f"prompt {self.id}"
