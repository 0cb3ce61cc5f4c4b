"""Prompts and conversations from JSONL files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xxhash import xxh3_128_hexdigest

from megatron_lopd.artifacts.files import canonical_json
from megatron_lopd.errors import DataError

Message = Mapping[str, Any]

# What prompt files in the wild call these two.
PROMPT_FIELDS = ("prompt", "problem", "question", "messages")
ANSWER_FIELDS = ("answer", "expected_answer")


@dataclass(frozen=True)
class Prompt:
    """Chat messages under an id that is unique in its source; `answer` is what a grader needs, if any.

    In a prompt the last message is the user's; in a conversation to fine-tune on, the assistant's.
    """

    id: str
    messages: tuple[Message, ...]
    answer: str | None = None


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of each line that is not blank.

    Raises DataError naming file:line where a line is not a JSON object, and for a file that is missing,
    unreadable or empty.
    """
    empty = True
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"{path}:{number}: not valid JSON, at column {error.colno}: {error.msg}"
                    ) from None
                except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 100,000 brackets
                    raise DataError(f"{path}:{number}: not JSON to be read: {error}") from None
                if not isinstance(row, dict):
                    raise DataError(f"{path}:{number}: must be a JSON object, not {type(row).__name__}")
                _require_encodable(f"{path}:{number}", row)
                empty = False
                yield number, row
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text, at byte {error.start}: save it as UTF-8") from None
    if empty:
        raise DataError(f"{path}: the file is empty: it must hold one JSON object a line")


def _require_encodable(where: str, row: dict[str, Any]) -> None:
    """JSON can escape half a character (\\ud800 alone), which no tokenizer takes."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise DataError(f"{where}: {half!a} is half a character (a lone surrogate): remove it") from None


def read_prompts(
    path: Path,
    count: int | None = None,
    prompt_field: str | None = None,
    answer_field: str | None = None,
    suffix: str | None = None,
) -> list[Prompt]:
    """Prompts to answer, from the lines of a JSONL file; keys that are not asked for are left alone.

    The prompt, text or a list of messages, is in `prompt_field`, or in the one of PROMPT_FIELDS that is
    there; the answer, which may be absent, in `answer_field`, or in the one of ANSWER_FIELDS. `count` takes
    the first so many. An id that is not given is a digest of the messages as they are in the file: `suffix`,
    which is put after the last message on a line of its own, does not change it.

    Raises DataError naming file:line for a malformed line, a field that is missing or could be either of two,
    a last message that is already an answer, and a prompt or id met twice; and when there are fewer than
    `count`.
    """
    prompts = []
    for where, row, prompt in _read(path, count, prompt_field):
        *before, last = prompt.messages
        if last["role"] == "assistant":
            raise DataError(
                f"{where}: the last message is the assistant's: a prompt must end before the answer"
            )
        if suffix is not None:
            last = {**last, "content": f"{last['content']}\n{suffix}"}
        prompts.append(Prompt(prompt.id, (*before, last), _answer(where, row, answer_field)))
    return prompts


def read_conversations(path: Path) -> list[tuple[str, Prompt]]:
    """Conversations to fine-tune on, from lines of {messages, id?}, each ending with the assistant's answer.

    Each with where it is, "file:line".

    Raises DataError as `read_prompts` does, and for a last message that is not the assistant's.
    """
    conversations = []
    for where, _, conversation in _read(path, None, "messages"):
        if len(conversation.messages) < 2 or conversation.messages[-1]["role"] != "assistant":
            raise DataError(f"{where}: messages must be a question and, last, the assistant's answer to it")
        conversations.append((where, conversation))
    return conversations


def _read(
    path: Path, count: int | None, prompt_field: str | None
) -> Iterator[tuple[str, dict[str, Any], Prompt]]:
    """("file:line", the line's object, its prompt without the answer) with unique ids."""
    lines: dict[str, int] = {}
    for number, row in read_jsonl(path):
        if len(lines) == count:
            return
        where = f"{path}:{number}"
        prompt = _parse(where, row, prompt_field)
        if prompt.id in lines:
            raise DataError(
                f"{where}: repeats line {lines[prompt.id]} (id {prompt.id}): "
                "drop one, or give each an id of its own"
            )
        lines[prompt.id] = number
        yield where, row, prompt
    if count is not None and len(lines) < count:
        raise DataError(f"{path}: has {len(lines)} prompts, fewer than the {count} asked for: lower count")


def _parse(where: str, row: dict[str, Any], prompt_field: str | None) -> Prompt:
    field = prompt_field or _known_field(where, row, PROMPT_FIELDS, "prompt_field")
    if field is None or field not in row:
        wanted = prompt_field or " or ".join(PROMPT_FIELDS)
        raise DataError(f"{where}: must have {wanted}: it has {', '.join(map(repr, row)) or 'nothing'}")
    value = row[field]
    messages = value if isinstance(value, list) else [{"role": "user", "content": value}]
    if not messages:
        raise DataError(f"{where}: {field} must be text, or a list of {{role, content}} with at least one")
    for message in messages:
        if not (isinstance(message, dict) and all(_is_text(message.get(key)) for key in ("role", "content"))):
            raise DataError(
                f"{where}: {field} must be text, or messages with a role and a content each, both text, "
                "and none of them empty"
            )
    given = row.get("id", xxh3_128_hexdigest(canonical_json(messages)))
    if not isinstance(given, str | int) or given == "":
        raise DataError(f"{where}: id must be text or a whole number, and not empty")
    return Prompt(str(given), tuple(messages))


def _answer(where: str, row: dict[str, Any], answer_field: str | None) -> str | None:
    field = answer_field or _known_field(where, row, ANSWER_FIELDS, "answer_field")
    if answer_field is not None and answer_field not in row:
        raise DataError(f"{where}: must have {answer_field}, which answer_field names")
    answer = None if field is None else row[field]
    if answer is not None and (isinstance(answer, bool) or not isinstance(answer, str | int | float)):
        raise DataError(f"{where}: {field} must be text or a number, not {type(answer).__name__}")
    return None if answer is None else str(answer)


def _known_field(where: str, row: dict[str, Any], names: Sequence[str], setting: str) -> str | None:
    """The one of `names` that is in the row, or None. DataError where two are."""
    present = [name for name in names if name in row]
    if len(present) > 1:
        raise DataError(f"{where}: has both {' and '.join(present)}: say which to take with {setting}")
    return present[0] if present else None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""
