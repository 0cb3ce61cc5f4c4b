"""What makes prompts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from megatron_lopd.prompts.prompt import Prompt


class Task(ABC):
    """Prompts without a file. `name` is what a recipe calls it; `caption` what is asked, in a line."""

    name: ClassVar[str]
    caption: ClassVar[str]

    @abstractmethod
    def prompts(self, count: int, seed: int, split: str) -> Iterator[Prompt]:
        """`count` prompts, the same for the same arguments. `split`: "sft", "opd" or "eval".

        What one split has, no other may have: an answer that was trained on is no answer.
        """
