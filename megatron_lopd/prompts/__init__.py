"""Prompts: what they are, what reads a file of them by its format, and the tasks that make them."""

from megatron_lopd.prompts.arithmetic import Arithmetic
from megatron_lopd.prompts.json_lines import JsonLinesReader
from megatron_lopd.prompts.prompt import Prompt
from megatron_lopd.prompts.reader import Reader
from megatron_lopd.prompts.task import Task
from megatron_lopd.registry import PROMPT_READERS, TASKS

__all__ = ["Prompt", "Reader", "Task"]

PROMPT_READERS.add(JsonLinesReader)
TASKS.add(Arithmetic)
