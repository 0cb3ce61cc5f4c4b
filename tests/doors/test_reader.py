from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from megatron_lopd.data.dataset import open_shards
from megatron_lopd.data.schemas import ROLLOUTS
from megatron_lopd.prompts.arithmetic import problems
from tests.pipeline import write_recipe

WITH = ("recipe.yaml", "allow_user_code=true")


def write(path: Path, rows: list[list[str]]) -> None:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([["id", "question", "answer"], *rows])


def test_a_prompt_format_of_ones_own(
    root: Path, edited: Callable[[Path], None], refused: Callable[..., str], told: Callable[..., str]
) -> None:
    rows = [[p.id, p.prompt, p.answer] for p in problems(20, seed=1, split="opd")]
    write(root / "opd.csv", rows)
    prompts = {"opd": {"path": "opd.csv", "format": "my_reader:CsvReader"}}
    write_recipe(root, prompts=prompts, sft={"checkpoint": "student", "teacher": "teacher"})

    assert "my_reader:CsvReader is code of yours: set allow_user_code=true" in refused(
        2, "rollout", "recipe.yaml"
    )
    Path("opd.xlsx").touch()
    unnamed = refused(2, "rollout", *WITH, "prompts.opd={path: opd.xlsx}")
    assert "opd.xlsx: nothing is known to read .xlsx: use .jsonl" in unnamed
    assert "my_reader:CsvReader: comma-separated values" in told("run", *WITH, "--help")
    assert "csv (my_reader:CsvReader)" in told("doctor", *WITH)
    told("sft", *WITH)
    told("rollout", *WITH)
    assert {record.sample_id for record in open_shards(ROLLOUTS, root / "run/rollout")} == {
        f"{row[0]}/0" for row in rows
    }

    source = root / "code/my_reader.py"
    parents = json.loads((root / "run/rollout/manifest.json").read_text())["parents"]
    assert hashlib.sha256(source.read_bytes()).hexdigest() in parents["prompts"]["digests"].values()
    edited(source)
    line = refused(3, "rollout", *WITH)
    assert "the prompts of rollout changed after it was made: source of my_reader:CsvReader was" in line

    write(root / "opd.csv", [*rows, ["short"]])
    assert "opd.csv:22: has not as many fields as there are columns" in refused(1, "rollout", *WITH)
