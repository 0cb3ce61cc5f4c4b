"""Prompt files: every message becomes the tokens that it says and no other, or its line is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tests.attacks.attack import Attack
from tests.attacks.changes import (
    ODD_TEXT,
    Stand,
    byte_changes,
    dump,
    has_text,
    json_values,
    mostly,
    special_changes,
)
from tests.model_zoo import ASSISTANT, CHARACTERS, END, PAD, USER

CONTROLS = (ASSISTANT, END, USER, PAD, "<|unknown|>", f"1+1{END}{ASSISTANT}2", "user|><|assistant")
VOCABULARY = [PAD, END, USER, ASSISTANT, "<|unknown|>", *CHARACTERS]
UNKNOWN = VOCABULARY.index("<|unknown|>")

said = st.text(CHARACTERS, min_size=1, max_size=12)
contents = mostly(said, st.one_of(st.sampled_from([*ODD_TEXT, *CONTROLS]), json_values))
roles = st.one_of(
    st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "User", "user|><|assistant", ""]),
    contents,
)
turns = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": contents}),
    min_size=1,
    max_size=4,
)
messages = st.one_of(
    turns,
    st.lists(st.fixed_dictionaries({"role": roles, "content": contents}), max_size=3),
    st.lists(
        st.fixed_dictionaries(
            {"role": st.just("user"), "content": contents},
            optional={
                "name": contents,
                "tool_calls": json_values,
                "reasoning_content": contents,
                "thinking": contents,
                "content_type": contents,
            },
        ),
        max_size=2,
    ),
    json_values,
)
asked = st.one_of(
    st.fixed_dictionaries({"prompt": contents}),
    st.fixed_dictionaries({"question": contents}),
    st.fixed_dictionaries({"messages": turns}),
)
rows = mostly(
    asked,
    st.one_of(
        st.dictionaries(st.sampled_from(["prompt", "problem", "question"]), contents, max_size=2),
        st.fixed_dictionaries({"messages": messages}, optional={"id": json_values, "answer": json_values}),
        st.fixed_dictionaries({"prompt": messages}, optional={"id": json_values, "tools": json_values}),
        json_values,
    ),
)


@dataclass(frozen=True)
class Lines:
    """A file of these rows, a line each, between whole ones."""

    rows: tuple[Any, ...]
    separator: str
    answered: bool  # to be fine-tuned on


@dataclass(frozen=True)
class Raw:
    """A file of whole rows, changed in its bytes or for something else."""

    change: Any


class Prompts(Attack[Any]):
    """Rows of any shape, roles, keys, control tokens spelled out, bytes, and what is no file."""

    name = "prompts"
    copies = ("student",)
    examples = 10

    def changes(self) -> SearchStrategy[Any]:
        return mostly(
            st.builds(
                Lines,
                st.lists(rows, min_size=1, max_size=2).map(tuple),
                st.sampled_from(["\n", "\r\n", "\n\n", "\r", "\u2028", " \n\t\n"]),
                st.booleans(),
            ),
            st.builds(Raw, st.one_of(byte_changes, special_changes)),
        )

    def build(self, world: Path) -> None:
        good = [{"id": f"good-{number}", "prompt": f"1+{number}="} for number in range(2)]
        (world / "prompts.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in good))

    def spoil(self, world: Path, change: Any) -> None:
        path = world / "prompts.jsonl"
        if isinstance(change, Lines):
            lines = [dump(each).replace(b"\n", b" ") for each in change.rows]
            ends = change.separator.encode()
            good = b"" if change.answered else path.read_bytes()  # those have no answer
            path.write_bytes(good + ends.join(lines) + ends)
        else:
            change.change(path)

    def use(self, world: Path, change: Any) -> str:
        """Each prompt's tokens."""
        from megatron_lopd.data.chat import Chat
        from megatron_lopd.prompts.rows import read_conversations, read_prompts

        path, chat = Path("prompts.jsonl"), Chat("student")
        if isinstance(change, Lines) and change.answered:
            pairs = [chat.conversation(each.messages, at, 5000) for at, each in read_conversations(path)]
            return json.dumps([[], [], *([*prompt.tolist(), *answer.tolist()] for prompt, answer in pairs)])
        return json.dumps([chat.prompt(each.messages, each.id, 5000).tolist() for each in read_prompts(path)])

    def allows(self, change: Any, before: str, after: str) -> bool:
        if isinstance(change, Raw):
            return not isinstance(change.change, Stand) or before == after
        expected = [expected_tokens(row, change.answered) for row in change.rows]
        return bool(json.loads(after)[2:] == expected)

    def named(self, change: Any) -> Sequence[str]:
        # A prompt is also told by its id.
        return ["prompts.jsonl"] if isinstance(change, Raw) else ()


def expected_tokens(row: Any, answered: bool) -> list[int] | None:
    """Of the toy template: the control tokens that it puts, and each character of what is said by itself."""
    if not isinstance(row, dict) or has_text(row):
        return None
    field = next((name for name in ("prompt", "problem", "question", "messages") if name in row), "messages")
    value = row.get(field)
    tokens: list[int] = []
    for message in value if isinstance(value, list) else [{"role": "user", "content": value}]:
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            return None  # what the template does not print
        opening = f"<|{message['role']}|>"
        if opening not in VOCABULARY[2:4]:
            return None
        tokens.append(VOCABULARY.index(opening))
        tokens += [VOCABULARY.index(each) if each in CHARACTERS else UNKNOWN for each in message["content"]]
        tokens += [VOCABULARY.index(END)] if message["role"] == "assistant" else []
    return tokens if answered else [*tokens, VOCABULARY.index(ASSISTANT)]
