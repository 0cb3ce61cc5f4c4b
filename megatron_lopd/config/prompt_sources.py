"""Where a recipe's prompts come from."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_lopd.config.keys import Count, FilePath, key, require
from megatron_lopd.registry import PROMPT_READERS, TASKS

_SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class PromptSource:
    """Where prompts come from: a file, or a built-in task that makes them."""

    path: FilePath | None = key("file of rows {prompt | problem | question | messages, answer?, id?}", None)
    format: str | None = key("what reads the file; empty: by its suffix", None, door=PROMPT_READERS)
    task: str | None = key("built-in task that makes the prompts", None, door=TASKS)
    count: Count | None = key("prompts to take (tasks need it; files: the first so many)", None)
    prompt_field: str | None = key(
        "the file's field with the prompt, text or a list of messages; empty: the one of prompt, problem, "
        "question, messages that is there",
        None,
    )
    answer_field: str | None = key(
        "the file's field with the right answer, with dots within another: reward_model.ground_truth, "
        "answers.0; empty: the one of answer, expected_answer, ground_truth, reward_model.ground_truth that "
        "is there",
        None,
    )
    extra_fields: tuple[str, ...] = key("further fields of the file that the grader needs", ())
    suffix: str | None = key(
        "text put after each prompt of the file, on a line of its own, such as: Please reason step by step, "
        "and put your final answer within \\boxed{}.",
        None,
    )

    def __post_init__(self) -> None:
        require(
            (self.path is None) != (self.task is None),
            "prompts: give either path (a file) or task (a built-in task), and not both",
        )
        require(self.task is None or self.count is not None, f"prompts: task {self.task} needs count")
        for name in ("format", "prompt_field", "answer_field", "suffix"):
            value = getattr(self, name)
            require(value != "", f"prompts.{name} is empty text: leave it out")
            require(
                value is None or self.task is None,
                f"prompts.{name} is for the prompts of a file: drop it with task {self.task}",
            )


@dataclass(frozen=True)
class PromptSources:
    sft: PromptSource | None = key("prompts the teacher answers for SFT", None)
    opd: PromptSource | None = key("prompts the student rolls out for OPD", None)
    eval: dict[str, PromptSource] | None = key(
        "prompts with answers, to evaluate on: one source, or several under names of your choice", None
    )

    def __post_init__(self) -> None:
        require(self.eval != {}, "prompts.eval names no set: give a source (path or task), or leave it out")
        for name in self.eval or ():
            require(
                _SET_NAME.fullmatch(name) is not None,
                f"prompts.eval: {name!r} cannot name a directory: use letters, digits, '.', '_' and '-'",
            )
