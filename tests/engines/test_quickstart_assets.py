"""What the quickstart ships: its teacher knows the task, and its parts fit each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_lopd.artifacts.fingerprint import fingerprint_model
from megatron_lopd.artifacts.lineage import read_model_lineage
from megatron_lopd.commands import run
from megatron_lopd.config import EngineConfig, Sampling, load_recipe
from megatron_lopd.data.chat import Chat
from megatron_lopd.engines import Prompted, open_engine
from megatron_lopd.families.architecture import check_layout, read_architecture
from megatron_lopd.pipeline.resolved import ResolvedRun
from megatron_lopd.prompts.arithmetic import grade, problems
from megatron_lopd.stages import table

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples/quickstart"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_teacher_is_over_97_percent_accurate(temperature: float) -> None:
    chat = Chat(str(QUICKSTART / "teacher"))
    asked = list(problems(1000, seed=123, split="eval"))
    prompts = chat.prompts([(p.id, [{"role": "user", "content": p.prompt}]) for p in asked], 64)
    requests = [Prompted(p.id, tokens, n) for n, (p, tokens) in enumerate(zip(asked, prompts, strict=True))]
    engine = open_engine(EngineConfig(batch_size=1000), str(QUICKSTART / "teacher"))
    answers = engine.generate(requests, Sampling(max_new_tokens=26, temperature=temperature), chat.end_tokens)
    right = [
        answer.finish_reason == "stop" and grade(p.prompt, chat.decode(answer.response_tokens))
        for p, answer in zip(asked, answers, strict=True)
    ]
    assert sum(right) / len(right) > 0.97


def test_the_teacher_carries_the_lineage_of_its_making() -> None:
    lineage = read_model_lineage(QUICKSTART / "teacher")
    assert lineage is not None
    assert lineage.made_by == "sft"
    assert lineage.model == fingerprint_model(QUICKSTART / "teacher").parts()


def test_a_worked_problem_is_rendered_as_the_student_must_write_it() -> None:
    chat = Chat(str(QUICKSTART / "student"))
    (problem,) = problems(1, seed=0, split="sft")
    turns = [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": problem.solution}]
    prompt, response = chat.conversation(turns, problem.id, 64)
    assert prompt.tolist() == chat.prompt(turns[:1], problem.id, 64).tolist()
    assert chat.decode(response) == problem.solution
    assert response[-1] in chat.end_tokens


@pytest.mark.parametrize("name", ["recipe.yaml", "make_teacher.yaml"])
def test_the_recipes_are_valid(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    data = tmp_path / "data.jsonl"
    turns = [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": "3"}]
    data.write_text(json.dumps({"messages": turns}) + "\n")
    overrides = [
        f"run_dir={tmp_path / 'run'}",
        *([f"sft.data={data}"] if name == "make_teacher.yaml" else []),
    ]
    recipe = load_recipe(QUICKSTART / name, overrides)
    assert [*run.describe(ResolvedRun(recipe), [stage.name for stage in table.STAGES])]


def test_the_student_splits_over_two_ranks_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    student = read_architecture(QUICKSTART / "student")
    assert student.vocab_size % 2 == 1  # so that tensor parallelism has something to pad
    for layout in ("parallel.tensor=2", "parallel.pipeline=2"):
        recipe = load_recipe(QUICKSTART / "recipe.yaml", [layout, "parallel.processes=2"])
        check_layout(student, recipe.parallel)
