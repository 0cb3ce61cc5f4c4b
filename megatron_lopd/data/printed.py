"""Whether a chat template prints what a message says.

A template prints the keys that it knows of the roles that it knows, and can take a part of an answer away (a
thought, say). What it leaves out is gone without a word, and two prompts that differ in it are one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_lopd.prompts.prompt import Message

# What tells a tool's call from another, which few templates print, and none needs to.
_HANDLES = frozenset({"id", "type", "index", "tool_call_id"})
# What turns a model's thinking on or off, as a word by itself: a template may do as it says, and take it out.
_SWITCH = re.compile(r"(?<!\S)/(?:no_)?think(?!\S)")


def leaves(message: Message) -> Iterator[tuple[str, str]]:
    """(key, text) of all that a message says, its role apart: nested ones by their whole path."""
    for key, value in message.items():
        if key != "role":
            yield from _leaves(key, value)


def _leaves(key: str, value: Any) -> Iterator[tuple[str, str]]:
    if key.rpartition(".")[2] in _HANDLES:
        return
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _leaves(f"{key}.{name}", each)
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from _leaves(f"{key}[{number}]", each)
    elif isinstance(value, str):
        yield key, value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, json.dumps(value)


def first_unprinted(messages: Sequence[Message], rendered: str) -> tuple[int, str] | None:
    """(number, key) of the first text of `messages` that is not in `rendered`; None where all is.

    White space is the template's to choose, and JSON may be in JSON's own spelling. Of what is not an answer
    the words that turn thinking on or off may be missing.
    """
    whole = _squeezed(rendered)
    for number, message in enumerate(messages):
        for key, text in leaves(message):
            said = [text] if message["role"] == "assistant" else [text, _SWITCH.sub("", text)]
            if not any(_squeezed(each) in whole for form in said for each in _spellings(form)):
                return number, key
    return None


def reaches(text: str, opening: str, rendered: str) -> bool:
    """Whether `text` is in `rendered` beyond `opening`, with which it begins."""
    whole, begin = _squeezed(rendered), len(_squeezed(opening))
    for each in _spellings(text):
        squeezed = _squeezed(each)
        at = whole.rfind(squeezed)
        if at >= 0 and (at + len(squeezed) > begin or not squeezed):
            return True
    return False


def _spellings(text: str) -> Iterator[str]:
    yield text
    for ascii_only in (False, True):
        yield json.dumps(text, ensure_ascii=ascii_only)[1:-1]


def _squeezed(text: str) -> str:
    return "".join(text.split())


def marked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """`messages` with a word of its own, found nowhere else, for each text that they have."""
    count = 0

    def mark(value: Any, key: str) -> Any:
        nonlocal count
        if key in _HANDLES or key == "role":
            return value
        if isinstance(value, Mapping):
            return {name: mark(each, name) for name, each in value.items()}
        if isinstance(value, list):
            return [mark(each, key) for each in value]
        if isinstance(value, str) and value.strip():  # nothing can be missed of what says nothing
            count += 1
            return f"lopd{count}mark"
        return value

    return [{key: mark(value, key) for key, value in message.items()} for message in messages]


def shape(messages: Sequence[Message]) -> str:
    """The same for messages that `marked` makes the same of: their roles and keys."""
    return json.dumps(marked(messages), ensure_ascii=False, sort_keys=True)
