from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_lopd.artifacts import stamps
from megatron_lopd.config import PromptSource
from megatron_lopd.errors import ConfigError, DataError
from megatron_lopd.prompts.json_lines import JsonLinesReader
from megatron_lopd.prompts.prompt import Prompt
from megatron_lopd.prompts.rows import read_conversations, read_prompts
from megatron_lopd.prompts.sources import PromptSet, load_prompts
from megatron_lopd.registry import allowing_user_code


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


@pytest.mark.parametrize(
    "row",
    [
        {"problem": "1+1?", "answer": "2", "solution": "left alone"},  # AIME 2024, MATH-500
        {"question": "1+1?", "answer": 2, "id": "x"},
        {"prompt": [{"role": "user", "content": "1+1?"}], "expected_answer": "2"},
    ],
)
def test_the_names_of_fields_in_the_wild(tmp_path: Path, row: dict[str, Any]) -> None:
    (prompt,) = read_prompts(write(tmp_path / "p.jsonl", row))
    assert prompt.messages == ({"role": "user", "content": "1+1?"},)
    assert prompt.answer == "2"


def test_fields_that_are_named(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.jsonl", {"prompt": "no", "Problem": "1+1?", "answer": 3, "solution": "It is 2."}
    )
    (prompt,) = read_prompts(path, prompt_field="Problem", answer_field="solution")
    assert (prompt.messages[0]["content"], prompt.answer) == ("1+1?", "It is 2.")
    with pytest.raises(DataError, match=r"p\.jsonl:1: must have problem: it has 'prompt', 'Problem'"):
        read_prompts(path, prompt_field="problem")
    with pytest.raises(DataError, match=r"p\.jsonl:1: must have gold, which answer_field names"):
        read_prompts(path, answer_field="gold")


@pytest.mark.parametrize(
    ("row", "answer_field", "answer"),
    [
        ({"reward_model": {"style": "rule", "ground_truth": "2"}}, None, "2"),  # verl
        ({"ground_truth": 2}, None, "2"),
        ({"answer": None, "ground_truth": "2"}, None, "2"),
        ({"answer": 2, "expected_answer": None, "reward_model": {"ground_truth": "2"}}, None, "2"),
        ({"answer": "2", "reward_model": {"ground_truth": "left alone"}}, "answer", "2"),
        ({"answer": None, "reward_model": {"ground_truth": None}}, None, None),
        ({"question": None}, None, None),
        ({"reward_model": {"style": "model"}}, None, None),
        ({"answer": {"value": 2.5, "unit": "cm"}}, "answer.value", "2.5"),
        ({"answers": [["2"], "3"]}, "answers.0.0", "2"),
        ({"label.gold": 2, "label": {"gold": 3}}, "label.gold", "2"),  # a name with a dot is a name
        ({"answer": 1e-5}, None, "1e-05"),
    ],
)
def test_answers_within_other_fields(
    tmp_path: Path, row: dict[str, Any], answer_field: str | None, answer: str | None
) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "1+1?"} | row)
    (prompt,) = read_prompts(path, answer_field=answer_field)
    assert prompt.answer == answer


@pytest.mark.parametrize(
    "field", ["reward_model.gold", "answers.2", "answers.x", "prompt.0", "answers.", "."]
)
def test_an_answer_field_that_leads_nowhere(tmp_path: Path, field: str) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "1+1?", "answers": [1, 2], "reward_model": {}})
    with pytest.raises(DataError, match=r"p\.jsonl:1: must have .*, which answer_field names"):
        read_prompts(path, answer_field=field)


def test_a_suffix_is_a_line_after_the_prompt_and_leaves_its_id(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2+2?"}]
    path = write(tmp_path / "p.jsonl", {"prompt": "1+1?"}, {"messages": messages})
    for plain, suffixed in zip(read_prompts(path), read_prompts(path, suffix="Box it."), strict=True):
        assert suffixed.id == plain.id
        assert suffixed.messages[:-1] == plain.messages[:-1]
        assert suffixed.messages[-1]["content"] == f"{plain.messages[-1]['content']}\nBox it."


def test_extra_fields_are_kept_for_the_grader_and_decide(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "1+1?", "tests": ["a", 1], "other": 1})
    plain, extra = (read_prompts(path, extra_fields=fields) for fields in ((), ("tests",)))
    assert plain == [Prompt(extra[0].id, extra[0].messages)]
    assert extra[0].extra == {"tests": ["a", 1]}
    # What lineage knows the quickstart's prompts by: a run of an earlier release must find them unchanged.
    source = PromptSource(task="arithmetic", count=3)
    digest = PromptSet(source, "opd", 0).parent.digests
    assert digest == {"sha256": "ea844994114487505a5bdfed725fa4ff669060118d5c34ebe4e5354bed749e34"}
    sources = PromptSource(path=str(path)), PromptSource(path=str(path), extra_fields=("tests",))
    without, with_tests = (PromptSet(source, "opd", 0).parent for source in sources)
    assert without != with_tests
    with pytest.raises(DataError, match=r"p\.jsonl:1: must have gold, which extra_fields names"):
        read_prompts(path, extra_fields=["gold"])


def test_a_file_is_read_once_for_its_digest_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stamps, "TICK", -(10**9))  # as of a file that has been there for long
    path = write(tmp_path / "p.jsonl", {"prompt": "1+1?"}, {"prompt": "2+2?"})
    reads = 0
    rows = JsonLinesReader.rows

    def counting(self: JsonLinesReader, path: Path) -> Any:
        nonlocal reads
        reads += 1
        return rows(self, path)

    monkeypatch.setattr(JsonLinesReader, "rows", counting)

    def of(**options: Any) -> PromptSet:
        return PromptSet(PromptSource(path=str(path), **options), "opd", 0)

    first = of().parent
    assert (of().parent, reads) == (first, 1)
    others = [of(**each).parent for each in ({"count": 1}, {"suffix": "Box it."})]
    assert len({parent.digests["sha256"] for parent in (first, *others)}) == 3
    assert (of().parent, of(count=1).parent, reads) == (first, others[0], 3)
    # What was read decides, whatever the file has become since.
    begun = of()
    assert [prompt.messages[0]["content"] for prompt in begun.prompts] == ["1+1?", "2+2?"]
    write(path, {"prompt": "10+2?"}, {"prompt": "2+2?"})
    assert begun.parent == first != of().parent
    assert reads == 5


def test_a_reader_of_ones_own_is_asked_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may read more than the file that is named."""
    (tmp_path / "pairs.py").write_text(PAIRS)
    monkeypatch.syspath_prepend(tmp_path)
    path, beside = tmp_path / "p.pairs", tmp_path / "beside"
    path.touch()
    digests = set()
    with allowing_user_code(True):
        for text in ("1+1?", "2+2?"):
            beside.write_text(text)
            source = PromptSource(path=str(path), format="pairs:Pairs")
            digests.add(PromptSet(source, "opd", 0).parent.digests["sha256"])
    assert len(digests) == 2


PAIRS = """
from megatron_lopd.prompts import Reader

class Pairs(Reader):
    name, caption = "pairs", "what lies beside it"

    def rows(self, path):
        yield "beside", {"prompt": path.with_name("beside").read_text()}
"""


def test_a_suffix_that_nothing_reads_names_those_that_are(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", {"prompt": "a"})
    with pytest.raises(
        ConfigError, match=r"prompts\.opd: .*p\.csv: nothing is known to read \.csv: use \.jsonl"
    ):
        load_prompts(PromptSource(path=str(path)), "opd", 0)
    assert len(load_prompts(PromptSource(path=str(path), format="jsonl"), "opd", 0)) == 1
    assert len(read_prompts(path.rename(tmp_path / "P.JSON"))) == 1


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", "\n", {"a": 1}, "  \n", {"b": 2})
    assert list(JsonLinesReader().rows(path)) == [(f"{path}:2", {"a": 1}), (f"{path}:4", {"b": 2})]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}, '{"prompt": \n'], r"p\.jsonl:2: .*not valid JSON \(.*, column \d+\)"),
        (["1\n"], r"p\.jsonl:1: must be a JSON object, not int"),
        (['[{"prompt": "a"}]\n'], r"p\.jsonl:1: must be a JSON object a line, not one list of them"),
        (["[\n", '  {"prompt": "a"}\n', "]\n"], r"p\.jsonl:1: .*, not one list of them"),
        (["\n\n"], r"p\.jsonl: the file is empty"),
        ([{"answer": "a"}], r"p\.jsonl:1: must have prompt or problem or .*: it has 'answer'"),
        ([{"prompt": ""}], r"p\.jsonl:1: prompt must be text, or messages"),
        ([{"messages": []}], r"p\.jsonl:1: messages must be text, or a list"),
        ([{"messages": [{"role": "user"}]}], r"p\.jsonl:1: messages must be .* with a role and a content"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], r"p\.jsonl:1: the last message is the"),
        ([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}], r"p\.jsonl:3: repeats .*p\.jsonl:1 "),
        (
            [{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "x"}],
            r"p\.jsonl:2: repeats .*p\.jsonl:1 \(id x\)",
        ),
        ([{"prompt": "a", "answer": [1]}], r"p\.jsonl:1: answer must be text or a number, not list"),
        ([{"prompt": "a", "answer": ["7"]}], r"p\.jsonl:1: answer must .* such as answer_field=answer\.0$"),
        ([{"prompt": "a", "answer": {"value": 7}}], r"p\.jsonl:1: .* such as answer_field=answer\.value$"),
        ([{"prompt": "a", "answer": True}], r"p\.jsonl:1: answer must be text or a number, not bool"),
        ([{"prompt": "a", "id": ""}], r"p\.jsonl:1: id must be"),
        (
            [{"prompt": "a"}, {"question": "b", "problem": "c"}],
            r"p\.jsonl:2: has both problem and question: .*",
        ),
        ([{"prompt": "a", "messages": []}], r"p\.jsonl:1: has both prompt and messages: .* prompt_field"),
        (
            [{"prompt": "a", "answer": 1, "expected_answer": 2}],
            r"p\.jsonl:1: has both answer and expected_answer: .* answer_field",
        ),
        (
            [{"prompt": "a", "answer": 1, "ground_truth": 2}],
            r"p\.jsonl:1: has both answer and ground_truth: .* answer_field",
        ),
        (
            [{"prompt": "a", "ground_truth": 1, "reward_model": {"ground_truth": 2}}],
            r"p\.jsonl:1: has both ground_truth and reward_model\.ground_truth: .* answer_field",
        ),
        ([{"prompt": None}], r"p\.jsonl:1: prompt must be text"),
        (['{"prompt": "\\ud800"}\n'], r"p\.jsonl:1: .*half of a surrogate pair"),
        (['{"prompt": "a", "id": ' + "9" * 5000 + "}\n"], r"p\.jsonl:1: .*a number of 5,000 digits"),
        (['{"prompt": ' + "[" * 100_000 + "\n"], r"p\.jsonl:1: .*brackets more than"),
    ],
)
def test_bad_files_are_refused_with_file_and_line(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_prompts(write(tmp_path / "p.jsonl", *rows))
    assert "\n" not in str(caught.value)


def test_other_bad_input(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl: no such file"):
        read_prompts(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="has 1 prompts, fewer than the 2"):
        read_prompts(write(tmp_path / "p.jsonl", {"prompt": "a"}), count=2)
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_prompts(tmp_path / "latin.jsonl")
    with pytest.raises(DataError, match=r"p\.jsonl:1: must have messages: it has 'prompt'"):
        read_conversations(tmp_path / "p.jsonl")
    question = {"messages": [{"role": "user", "content": "q"}]}
    with pytest.raises(DataError, match=r"p\.jsonl:1: messages must be a question and"):
        read_conversations(write(tmp_path / "p.jsonl", question))


def test_conversations(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    ((where, conversation),) = read_conversations(write(tmp_path / "c.jsonl", {"messages": messages}))
    assert where == f"{tmp_path / 'c.jsonl'}:1"
    assert conversation.messages == tuple(messages)
