from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import yaml

from megatron_lopd.prompts.arithmetic import problems
from tests.pipeline import write_recipe

WITH = ("recipe.yaml", "allow_user_code=true")


def test_a_logger_of_ones_own(root: Path, refused: Callable[..., str], told: Callable[..., str]) -> None:
    talks = [
        [{"role": "user", "content": p.prompt}, {"role": "assistant", "content": p.solution}]
        for p in problems(16, seed=1, split="sft")
    ]
    (root / "sft.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    recipe = yaml.safe_load(write_recipe(root).read_text())
    loggers = ["jsonl", "my_logger:CsvLogger"]
    write_recipe(root, sft=recipe["sft"] | {"data": "sft.jsonl", "teacher": "teacher", "loggers": loggers})

    assert "my_logger:CsvLogger is code of yours: set allow_user_code=true" in refused(
        2, "sft", "recipe.yaml"
    )
    assert "my_logger:CsvLogger: losses.csv" in told("sft", *WITH, "--help")
    assert "csv (my_logger:CsvLogger)" in told("doctor", *WITH)
    told("tokenize", *WITH)
    (root / "run/sft/losses.csv").mkdir(parents=True)  # in the way of the logger's file
    assert "the logger csv cannot write: " in refused(1, "sft", *WITH)
    (root / "run/sft/losses.csv").rmdir()
    told("sft", *WITH)
    steps = [json.loads(line) for line in (root / "run/sft/metrics.jsonl").read_text().splitlines()]
    expected = ["step,loss of sft", *(f"{each['step']},{each['loss']!r}" for each in steps)]
    assert (root / "run/sft/losses.csv").read_text().splitlines() == expected
    assert not (root / "run/sft/tensorboard").exists()

    # How metrics are written decides nothing: an edited logger is no reason to train again.
    source = root / "code/my_logger.py"
    source.write_text(source.read_text() + "\n# edited\n")
    told("sft", *WITH)
