"""Prompts: where they come from, and what reads a file of them, by format."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lopd.registry import PROMPT_READERS


@dataclass(frozen=True)
class ReaderKind:
    name: str
    caption: str


PROMPT_READERS.add(ReaderKind("jsonl", "a JSON object a line"))
