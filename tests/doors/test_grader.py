from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_lopd.graders import Verdict
from megatron_lopd.prompts import Prompt
from megatron_lopd.prompts.arithmetic import problems
from tests.pipeline import write_recipe

WITH = ("recipe.yaml", "allow_user_code=true")


def test_a_grader_of_ones_own(
    root: Path,
    edited: Callable[[Path], None],
    refused: Callable[..., str],
    told: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [
        {"prompt": p.prompt, "answer": p.answer, "longest": 40} for p in problems(6, seed=1, split="eval")
    ]
    (root / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sampling = {"max_new_tokens": 12}
    write_recipe(
        root,
        prompts={"eval": {"path": "eval.jsonl", "extra_fields": ["longest"]}},
        sft={"checkpoint": "student", "teacher": "teacher"},
        train=None,
        evaluate={"grader": "my_grader:ExpressionGrader", "sampling": sampling},
    )
    assert "my_grader:ExpressionGrader is code of yours: set allow_user_code=true" in refused(
        2, "evaluate", "recipe.yaml"
    )
    assert "my_grader:ExpressionGrader: a Python expression" in told("evaluate", *WITH, "--help")
    assert "expression (my_grader:ExpressionGrader)" in told("doctor", *WITH)
    assert "needs an answer, and a whole number called longest" in refused(
        1, "evaluate", *WITH, "prompts.eval.extra_fields=[]"
    )
    told("sft", *WITH)
    told("evaluate", *WITH)

    source = root / "code/my_grader.py"
    config = json.loads((root / "run/evaluate/manifest.json").read_text())["config"]
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert f"my_grader:ExpressionGrader sha256:{digest}" in json.dumps(config)
    edited(source)
    assert "run/evaluate was made with" in refused(3, "evaluate", *WITH)

    import my_grader

    with my_grader.ExpressionGrader() as grader:
        prompt = Prompt("p", ({"role": "user", "content": "4+3"},), "7", {"longest": 12})
        assert grader.grade(prompt, "3+4") == Verdict(True, "7")
        assert grader.grade(prompt, "3+5") == Verdict(False, "8")
        assert grader.grade(prompt, "1+1+1+1+1+1+1") == Verdict(False)
        assert grader.grade(prompt, "9**9**9**9") == Verdict(False, ungraded=True)  # ended after a second
        assert grader.grade(prompt, "7") == Verdict(True, "7")
