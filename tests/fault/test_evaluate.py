"""`lopd evaluate` on prompt files as they are found in the wild: AIME-like, several sets, the math grader."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_lopd.cli import main
from megatron_lopd.data.chat import Chat
from megatron_lopd.data.dataset import open_shards
from megatron_lopd.data.schemas import ROLLOUTS

SUFFIX = "box"
AIME = [
    {"problem": "3+4*7", "answer": 9, "solution": "left alone", "year": "2024"},
    {"problem": "2*2+1", "answer": "005"},
    {"problem": "9-9+0", "answer": r"\boxed{0}"},
]
MATH = [{"question": "1+1", "expected_answer": r"\frac{4}{2}"}, {"question": "8-3", "expected_answer": "5"}]
ARGUMENTS = [
    "recipe.yaml",
    f"prompts.eval={{math500: {{path: math.jsonl}}, aime24: {{path: aime.jsonl, suffix: {SUFFIX}}}}}",
    "evaluate.grader=math",
    "evaluate.teacher=true",
    "evaluate.sampling.samples_per_prompt=3",
]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def root(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run's copy that is not evaluated yet, with two files of prompts beside its recipe."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    for stage in ("evaluate", "report"):
        shutil.rmtree(copy / "run" / stage)
    write(copy / "aime.jsonl", AIME)
    write(copy / "math.jsonl", MATH)
    monkeypatch.chdir(copy)
    return copy


def test_sets_of_files_are_graded_and_reported(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *ARGUMENTS]) == 0
    assert "sft on aime24" in capsys.readouterr().out
    accuracy = json.loads((root / "run/evaluate/results.json").read_text())["accuracy"]
    assert {name: set(rows) for name, rows in accuracy.items()} == {
        "aime24": {"sft", "lightning_opd", "teacher"},
        "math500": {"sft", "lightning_opd", "teacher"},
    }
    for name, n in (("aime24", 3), ("math500", 2)):
        for model, row in accuracy[name].items():
            assert (row["n"], row["k"], list(row["pass_at"])) == (n, 3, ["1", "2", "3"])
            assert row["pass_at"]["1"]["share"] == pytest.approx(row["sampled"])
            assert row["pass_at"]["3"]["share"] == pytest.approx(row["pass_at_k"])
            responses = list(open_shards(ROLLOUTS, root / "run/evaluate" / model / name / "sampled"))
            assert len(responses) == 3 * n
            assert row["cut"] == sum(each.finish_reason == "length" for each in responses) / (3 * n)
    asked = Chat("teacher", False).decode(responses[0].prompt_tokens)
    assert MATH[0]["question"] in asked
    assert SUFFIX not in asked
    first = next(iter(open_shards(ROLLOUTS, root / "run/evaluate/sft/aime24/greedy")))
    assert f"{AIME[0]['problem']}\n{SUFFIX}" in Chat("teacher", False).decode(first.prompt_tokens)
    page = (root / "run/report/index.html").read_text()
    assert page.index("Share of correct answers: math500") < page.index("Share of correct answers: aime24")
    assert "pass@2" in page
    assert main(["run", *ARGUMENTS]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_prompt_that_cannot_be_graded_stops_the_run_before_anything_is_spent(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(root / "math.jsonl", [*MATH, {"question": "2+2"}])
    assert main(["evaluate", *ARGUMENTS]) == 1
    (message,) = capsys.readouterr().err.strip().splitlines()
    assert "has no answer to grade by" in message
    assert not (root / "run/evaluate").exists()
    write(root / "math.jsonl", [*MATH, {"question": "2+2", "problem": "3", "answer": 4}])
    assert main(["evaluate", *ARGUMENTS]) == 1
    assert "math.jsonl:3: has both problem and question" in capsys.readouterr().err


def test_another_set_is_another_evaluation(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *ARGUMENTS]) == 0
    write(root / "aime.jsonl", AIME[:2])
    assert main(["evaluate", *ARGUMENTS]) == 3
    assert "prompts aime24 of evaluate changed after it was made" in capsys.readouterr().err
