"""Prompts and conversations from the rows of a file, whatever its format."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xxhash import xxh3_128_hexdigest

from megatron_lopd.errors import DataError
from megatron_lopd.files.digests import canonical_json
from megatron_lopd.prompts.prompt import Prompt
from megatron_lopd.prompts.reader import Reader, reader_of

Row = Mapping[str, Any]

# What prompt files in the wild call these two.
PROMPT_FIELDS = ("prompt", "problem", "question", "messages")
ANSWER_FIELDS = ("answer", "expected_answer", "ground_truth", "reward_model.ground_truth")

# What other formats have beside the messages for the model to see.
_BESIDE = ("tools", "functions", "system", "system_prompt")
# What other formats call roles that templates know by another name. Some print any role, and so these too.
_OTHER_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
# What a message has, in this format and in another; and how one begins as Python writes it.
_PAIRS = ({"role", "content"}, {"from", "value"})
_PYTHONS = re.compile(r"\s*\[?\s*\{\s*'(?:role|content|from|value)'\s*:")
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


def read_prompts(
    path: Path,
    count: int | None = None,
    prompt_field: str | None = None,
    answer_field: str | None = None,
    suffix: str | None = None,
    *,
    format: str | None = None,
    extra_fields: Sequence[str] = (),
) -> list[Prompt]:
    """Prompts to answer, from the rows of a file; fields that are not asked for are left alone.

    `format` names what reads the file; None goes by its suffix. The prompt, text or a list of messages, is in
    `prompt_field`, or in the one of PROMPT_FIELDS that is there; the answer, which may be absent, in
    `answer_field`, which may have dots, or in the one of ANSWER_FIELDS, and a null is none; `extra_fields`
    are kept as Prompt.extra. `count` takes the first so many. An id that is not given is a
    digest of the messages as they are in the file: `suffix`, which is put after the last message on a line of
    its own, does not change it.

    Raises DataError naming file and line for a malformed row, a field that is missing or could be either of
    two, a last message that is already an answer, and a prompt or id met twice; when there are fewer than
    `count`; and for a file that is missing, unreadable or empty. ConfigError for a format that is not known.
    """
    prompts = []
    for where, row, prompt in _read(path, reader_of(path, format), count, prompt_field):
        *before, last = prompt.messages
        if last["role"] == "assistant":
            raise DataError(
                f"{where}: the last message is the assistant's: a prompt must end before the answer"
            )
        if suffix is not None:
            last = {**last, "content": f"{last['content']}\n{suffix}"}
        answer, extra = _answer(where, row, answer_field), _extra(where, row, extra_fields)
        prompts.append(Prompt(prompt.id, (*before, last), answer, extra, where))
    return prompts


def read_conversations(path: Path) -> list[tuple[str, Prompt]]:
    """Conversations to fine-tune on, from rows of {messages, id?}, each ending with the assistant's answer.

    Each after its place, "file:line".

    Raises as `read_prompts` does, and DataError for a last message that is not the assistant's.
    """
    conversations = []
    for where, _, conversation in _read(path, reader_of(path), None, "messages"):
        if len(conversation.messages) < 2 or conversation.messages[-1]["role"] != "assistant":
            raise DataError(f"{where}: messages must be a question and, last, the assistant's answer to it")
        conversations.append((where, conversation))
    return conversations


def _read(
    path: Path, reader: Reader, count: int | None, prompt_field: str | None
) -> Iterator[tuple[str, Row, Prompt]]:
    """("file:line", the row there, its prompt without the answer) with unique ids."""
    places: dict[str, str] = {}
    for where, row in _rows(path, reader):
        if len(places) == count:
            return
        prompt = _parse(where, row, prompt_field)
        if prompt.id in places:
            raise DataError(
                f"{where}: repeats {places[prompt.id]} (id {prompt.id}): "
                "drop one, or give each an id of its own"
            )
        places[prompt.id] = where
        yield where, row, prompt
    if not places:
        raise DataError(f"{path}: the file is empty: it must hold {reader.caption}")
    if count is not None and len(places) < count:
        raise DataError(f"{path}: has {len(places)} prompts, fewer than the {count} asked for: lower count")


def _rows(path: Path, reader: Reader) -> Iterator[tuple[str, Row]]:
    try:
        yield from reader.rows(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text, at byte {error.start}: save it as UTF-8") from None


def _parse(where: str, row: Row, prompt_field: str | None) -> Prompt:
    field = prompt_field or _known_field(where, row, PROMPT_FIELDS, "prompt_field")
    if field is None or field not in row:
        wanted = prompt_field or " or ".join(PROMPT_FIELDS)
        if prompt_field is None and "conversations" in row:
            raise DataError(
                f"{where}: conversations is another format's (from, value): write messages of {{role, "
                "content}"
            )
        raise DataError(f"{where}: must have {wanted}: it has {', '.join(map(repr, row)) or 'nothing'}")
    value = row[field]
    if isinstance(value, str) and _is_messages(value):
        raise DataError(
            f"{where}: {field} is text that holds messages written out: give the list of them itself"
        )
    for unseen in _BESIDE:
        if unseen != field and row.get(unseen):
            raise DataError(
                f"{where}: {unseen} would not be shown to the model: write it into a system message, or take "
                "it out"
            )
    messages = value if isinstance(value, list) else [{"role": "user", "content": value}]
    if not messages:
        raise DataError(f"{where}: {field} must be text, or a list of {{role, content}} with at least one")
    for message in messages:
        if not (isinstance(message, dict) and all(_is_text(message.get(key)) for key in ("role", "content"))):
            raise DataError(
                f"{where}: {field} must be text, or messages with a role and a content each, both text, "
                "and none of them empty"
            )
        _require_role(where, message["role"])
    _require_json(where, field, messages)
    given = row.get("id", xxh3_128_hexdigest(canonical_json(messages)))
    if not isinstance(given, str | int) or given == "":
        raise DataError(f"{where}: id must be text or a whole number, and not empty")
    _require_json(where, "id", given)
    return Prompt(str(given), tuple(messages))


def _answer(where: str, row: Row, answer_field: str | None) -> str | None:
    field = answer_field or _known_field(where, row, ANSWER_FIELDS, "answer_field")
    if field is None:
        return None
    if not _has(row, field):
        raise DataError(f"{where}: must have {field}, which answer_field names")
    answer = _at(row, field)
    if isinstance(answer, Mapping | list) and answer:
        part = 0 if isinstance(answer, list) else next(iter(answer))
        raise DataError(
            f"{where}: {field} must be text or a number, not {type(answer).__name__}: name the part of it "
            f"that is the answer, such as answer_field={field}.{part}"
        )
    if answer is not None and (isinstance(answer, bool) or not isinstance(answer, str | int | float)):
        raise DataError(f"{where}: {field} must be text or a number, not {type(answer).__name__}")
    if isinstance(answer, float) and not math.isfinite(answer):
        raise DataError(f"{where}: {field} is {answer}, which is no number to compare with: correct it")
    _require_json(where, field, answer)
    return None if answer is None else str(answer)


def _has(row: Any, field: str) -> bool:
    try:
        _at(row, field)
    except (LookupError, ValueError, TypeError):
        return False
    return True


def _at(row: Any, field: str) -> Any:
    """The value of a field, or of one within it, as a path with dots. Raises as indexing does without it."""
    if isinstance(row, Mapping) and field in row:
        return row[field]
    first, dot, rest = field.partition(".")
    if not dot:
        return row[int(first)] if isinstance(row, list) else row[first]
    return _at(_at(row, first), rest)


def _extra(where: str, row: Row, fields: Sequence[str]) -> dict[str, Any]:
    for field in fields:
        if field not in row:
            raise DataError(f"{where}: must have {field}, which extra_fields names")
        _require_json(where, field, row[field])
    return {field: row[field] for field in fields}


def _known_field(where: str, row: Row, names: Sequence[str], setting: str) -> str | None:
    """The one of `names` that is in the row, or None; a null is there where nothing else is.

    DataError where two say different things.
    """
    present = [name for name in names if _has(row, name)]
    given = [name for name in present if _at(row, name) is not None]
    said = {str(_at(row, name)): name for name in reversed(given)}
    if len(said) > 1:
        raise DataError(
            f"{where}: has both {' and '.join(sorted(said.values(), key=names.index))}: say which to take "
            f"with {setting}"
        )
    return next(iter(given or present), None)


def _require_role(where: str, role: str) -> None:
    """Raise DataError for a role of another format, and for one that is more than a name."""
    if role in _OTHER_NAMES:
        raise DataError(
            f"{where}: role {role!r} is another format's name: chat templates call it {_OTHER_NAMES[role]!r}"
        )
    if not _ROLE.fullmatch(role):
        raise DataError(f"{where}: role {role!r} must be a name: letters, digits, _ and -")


def _is_messages(text: str) -> bool:
    """Whether a text is a message, or a list of some, written as JSON or as Python writes it."""
    if _PYTHONS.match(text):
        return True
    if not text.lstrip().startswith(("[", "{")):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    if isinstance(value, dict):  # many another thing in braces has one of them
        return any(pair <= value.keys() for pair in _PAIRS) or isinstance(value.get("messages"), list)
    return any(isinstance(each, dict) and bool({"role", "from"} & each.keys()) for each in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _require_json(where: str, field: str | None, value: Any) -> None:
    """Raise DataError for what no digest can be made of, or no tokenizer takes: JSON can escape half a
    character (\\ud800 alone)."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except TypeError as error:
        raise DataError(f"{where}: {field} is neither text nor numbers, nor lists of them: {error}") from None
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise DataError(f"{where}: {half!a} is half a character (a lone surrogate): remove it") from None
