"""answers.jsonl: each graded response as text, beside its prompt, the right answer and the verdict."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from megatron_lopd.artifacts.committed import CommittedFile
from megatron_lopd.errors import DataError
from megatron_lopd.files.reading import lines_of, parse_json, read_lines
from megatron_lopd.files.writing import atomic_file

if TYPE_CHECKING:  # `lopd inspect` reads answers, and need not wait for what writes them
    from megatron_lopd.data.records import Rollout
    from megatron_lopd.data.shards import ShardReader
    from megatron_lopd.graders import Verdict
    from megatron_lopd.prompts.prompt import Message, Prompt

ANSWERS = "answers.jsonl"
MODES = ("sampled", "greedy")
Word = Literal["right", "wrong", "cut", "ungraded"]
VERDICTS = get_args(Word)


@dataclass(frozen=True)
class GradedAnswer:
    """A response to a prompt. `gold` is the answer that the prompt came with, `answer` the one in `text`.

    `verdict`: "cut" at the horizon and "ungraded", where the grader failed, count as wrong. `answer` is None
    where the grader reads none.
    """

    id: str
    mode: str
    prompt: Sequence[Message]
    gold: str | None
    text: str
    answer: str | None
    verdict: Word


def write_answers(
    directory: Path,
    answers: Mapping[str, ShardReader[Rollout]],
    text: Callable[[Rollout], str],
    prompts: Sequence[Prompt],
    verdicts: Mapping[str, Mapping[str, list[Verdict]]],
) -> None:
    """Write `answers`, by mode, to `directory`: `text` of each. `verdicts` by mode, then by prompt's id."""
    by_id = {prompt.id: prompt for prompt in prompts}
    with atomic_file(directory / ANSWERS, "w") as stream:
        for mode in MODES:
            left = {name: iter(of_prompt) for name, of_prompt in verdicts[mode].items()}
            for rollout in answers[mode]:
                prompt = by_id[rollout.sample_id.rpartition("/")[0]]
                answer = _graded(rollout, mode, prompt, next(left[prompt.id]), text(rollout))
                stream.write(json.dumps(asdict(answer)) + "\n")


def _graded(rollout: Rollout, mode: str, prompt: Prompt, verdict: Verdict, text: str) -> GradedAnswer:
    failed = "ungraded" if verdict.ungraded else "wrong"
    word: Any = "right" if verdict.right else "cut" if rollout.finish_reason == "length" else failed
    return GradedAnswer(rollout.sample_id, mode, prompt.messages, prompt.answer, text, verdict.answer, word)


def _lines(file: Path | CommittedFile) -> Iterator[tuple[int, str]]:
    if isinstance(file, Path):
        yield from read_lines(file)
    else:
        with file.open() as stream:
            yield from lines_of(stream, file.path)


def read_answers(file: Path | CommittedFile) -> Iterator[GradedAnswer]:
    """What `write_answers` wrote, one at a time. DataError naming the line that is damaged."""
    path = file if isinstance(file, Path) else file.path
    for number, line in _lines(file):
        where = f"{path}:{number}"
        plain = parse_json(line, where)
        if not _is_answer(plain):
            raise DataError(f"{where}: damaged: it is no graded answer")
        yield GradedAnswer(**plain)


def _is_answer(plain: Any) -> bool:
    """Whether a value has a GradedAnswer's keys, and under each what may stand there: what a grader compares
    is its own affair."""
    if not isinstance(plain, dict) or plain.keys() != {field.name for field in fields(GradedAnswer)}:
        return False
    prompt = plain["prompt"]
    return (
        isinstance(plain["id"], str)
        and plain["mode"] in MODES
        and isinstance(prompt, list)
        and all(isinstance(message, dict) for message in prompt)
        and isinstance(plain["gold"], str | None)
        and isinstance(plain["text"], str)
        and plain["verdict"] in VERDICTS
    )
