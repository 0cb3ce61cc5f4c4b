"""Where answers end: all end tokens go along; what was cut at the horizon is said, and can be left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_lopd.cli import main
from megatron_lopd.data.chat import Chat
from megatron_lopd.data.dataset import TrainingData, open_shards
from megatron_lopd.data.schemas import ROLLOUTS
from tests.model_zoo import END, make_model_dir
from tests.pipeline import SMALL, write_recipe

OTHER = 9  # a second end token of the teacher's, which only its config.json names
OPTIONS = ["sft.steps=2", "train.steps=2", "prompts.eval=null"]


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content))


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A teacher without generation_config.json, and a base student that names another end token."""
    monkeypatch.chdir(tmp_path)
    make_model_dir(Path("teacher"), seed=1, **SMALL)
    Path("teacher/generation_config.json").unlink()
    edit(Path("teacher/config.json"), eos_token_id=[1, OTHER])
    make_model_dir(Path("student"), seed=2, tied=True, **SMALL)
    edit(Path("student/config.json"), eos_token_id=33)
    edit(Path("student/generation_config.json"), eos_token_id=33)
    return write_recipe(tmp_path).name


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *expected: str) -> None:
    capsys.readouterr()
    assert main(arguments) == 3
    (message,) = [line for line in capsys.readouterr().err.splitlines() if "refused" in line]
    for text in expected:
        assert text in message


def test_what_cannot_be_graded_is_refused_by_every_command(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the same words, before anything is spent."""
    commands = (["run", recipe, "--dry-run"], ["plan", recipe, "--gpus", "h100:1"], ["doctor", recipe])
    row = {"prompt": "1+1="}
    for answer, said in (({}, "has no answer to grade by"), ({"answer": "\\frac{"}, "can read")):
        Path("eval.jsonl").write_text(json.dumps(row | answer) + "\n")
        for command in commands:
            capsys.readouterr()
            options = ["prompts.eval={path: eval.jsonl}", "evaluate.grader=math"]
            assert main([*command, *OPTIONS[:2], *options]) == 1, command
            error = capsys.readouterr().err.strip().splitlines()[-1]
            assert "eval.jsonl:1: prompt" in error
            assert said in error


def test_what_is_made_stops_where_it_was_trained_to(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", recipe, *OPTIONS]) == 0
    said = capsys.readouterr().out
    answers = {stage: list(open_shards(ROLLOUTS, Path("run", stage))) for stage in ("generate", "rollout")}
    for stage, rollouts in answers.items():
        stopped = {int(each.response_tokens[-1]) for each in rollouts if each.finish_reason == "stop"}
        assert stopped <= {1, OTHER}
        cut = sum(each.finish_reason == "length" for each in rollouts)
        assert f"{stage}: {cut} of 40 answers ({100 * cut / 40:.1f} %) were cut at the horizon of 12" in said
        assert f"raise {stage}.sampling.max_new_tokens" in said
    cut = sum(each.finish_reason == "length" for each in answers["generate"])
    assert f"lopd: sft: {cut} of 40 answers were cut and have no end: they are trained on as they are" in said
    for made in ("run/sft/model", "run/export/model"):
        model = AutoModelForCausalLM.from_pretrained(made)
        assert sorted(model.generation_config.eos_token_id) == [1, OTHER]
        assert sorted(model.config.eos_token_id) == [1, OTHER]
        assert AutoTokenizer.from_pretrained(made).eos_token == END
        assert Chat(made).end_tokens == {1, OTHER}

    # Changing an end token, by whichever file, is as any other change.
    shutil.rmtree("run/rollout")
    Path("teacher/generation_config.json").write_text('{"eos_token_id": [1]}')
    refused(
        capsys, ["run", recipe, *OPTIONS], "the teacher of generate changed after it was made: end_tokens"
    )


def test_the_date_is_part_of_the_plan(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    for model in ("teacher", "student"):
        template = Path(model, "chat_template.jinja")
        template.write_text("{{ strftime_now('%Y') }}" + template.read_text())
    assert main(["generate", recipe]) == 0
    manifest = json.loads(Path("run/generate/manifest.json").read_text())
    assert manifest["parents"]["teacher"]["digests"]["date"] == "2024-07-26"


def test_answers_that_were_cut_can_be_left_out(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", recipe]) == 0
    answers = list(open_shards(ROLLOUTS, Path("run/generate")))
    whole = [each for each in answers if each.finish_reason == "stop"]
    assert 0 < len(whole) < len(answers)
    data = TrainingData(Path("run/generate"), leave_out_cut=True)
    assert len(data) == len(whole)
    for index, expected in enumerate(whole):
        found = data.sample(index).rollout
        assert found.sample_id == expected.sample_id
        assert data.lengths[index] == len(found.prompt_tokens) + len(found.response_tokens)
    capsys.readouterr()
    assert main(["sft", recipe, "sft.leave_out_cut=true", "sft.steps=1", "sft.global_batch_size=2"]) == 0
    cut = len(answers) - len(whole)
    assert (
        f"lopd: sft: {cut} of 40 answers were cut and have no end: they are left out"
        in capsys.readouterr().out
    )
    refused(capsys, ["sft", recipe, "sft.steps=1", "sft.global_batch_size=2"], "made with leave_out_cut=True")

    shutil.rmtree("run")
    short = ["generate.sampling.max_new_tokens=1", "seed=7", "prompts.sft.count=5"]
    assert main(["generate", recipe, *short]) == 0
    assert main(["sft", recipe, "sft.leave_out_cut=true", *short]) == 1
    assert (
        "each of the 5 answers was cut at the horizon of 1 tokens, and none is left"
        in capsys.readouterr().err
    )
