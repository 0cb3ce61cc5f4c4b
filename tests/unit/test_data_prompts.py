from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_lopd.data.prompts import read_conversations, read_jsonl, read_prompts
from megatron_lopd.errors import DataError


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def test_prompts_of_every_form(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2+2?"}]
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "1+1?", "answer": 2, "source": "left alone"},
        "\n",
        {"messages": messages, "id": 7},
        {"prompt": "3+3?"},
    )
    first, second, third = read_prompts(path)
    assert first.messages == ({"role": "user", "content": "1+1?"},)
    assert (first.answer, second.answer, second.id) == ("2", None, "7")
    assert second.messages == tuple(messages)
    assert len({first.id, second.id, third.id}) == 3
    assert read_prompts(path, count=2) == [first, second]
    # The id comes from the content alone, so that sample ids survive a reordering of the file.
    again = write(tmp_path / "q.jsonl", {"messages": [{"content": "1+1?", "role": "user"}]})
    assert read_prompts(again)[0].id == first.id


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", "\n", {"a": 1}, "  \n", {"b": 2})
    assert list(read_jsonl(path)) == [(2, {"a": 1}), (4, {"b": 2})]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}, '{"prompt": \n'], r"p\.jsonl:2: not valid JSON, at column"),
        (["[1]\n"], r"p\.jsonl:1: must be a JSON object, not list"),
        (["\n\n"], r"p\.jsonl: the file is empty"),
        ([{"answer": "a"}], r"p\.jsonl:1: must have either prompt or messages"),
        ([{"prompt": ""}], r"p\.jsonl:1: each message must have"),
        ([{"messages": []}], r"p\.jsonl:1: messages must be a list"),
        ([{"messages": [{"role": "user"}]}], r"p\.jsonl:1: each message must have a role and a content"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], r"p\.jsonl:1: the last message is the"),
        ([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}], r"p\.jsonl:3: repeats line 1"),
        ([{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x"}], r"p\.jsonl:2: repeats line 1 \(id x\)"),
        ([{"prompt": "a", "answer": [1]}], r"p\.jsonl:1: answer must be text or a number, not list"),
        ([{"prompt": "a", "id": ""}], r"p\.jsonl:1: id must be"),
        (['{"prompt": "\\ud800"}\n'], r"p\.jsonl:1: .* is half a character"),
        (['{"prompt": "a", "id": ' + "9" * 5000 + "}\n"], r"p\.jsonl:1: not JSON to be read: Exceeds"),
        (["[" * 100_000 + "\n"], r"p\.jsonl:1: not JSON to be read: maximum recursion depth"),
    ],
)
def test_bad_files_are_refused_with_file_and_line(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_prompts(write(tmp_path / "p.jsonl", *rows))
    assert "\n" not in str(caught.value)


def test_other_bad_input(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl: cannot be read: No such file"):
        read_prompts(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="has 1 prompts, fewer than the 2"):
        read_prompts(write(tmp_path / "p.jsonl", {"prompt": "a"}), count=2)
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_prompts(tmp_path / "latin.jsonl")
    with pytest.raises(DataError, match=r"p\.jsonl:1: messages must be a question and"):
        read_conversations(tmp_path / "p.jsonl")


def test_conversations(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (conversation,) = read_conversations(write(tmp_path / "c.jsonl", {"messages": messages}))
    assert conversation.messages == tuple(messages)
