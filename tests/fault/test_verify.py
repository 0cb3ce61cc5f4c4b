"""`lopd verify` and `lopd inspect` of a finished run, as it is and as somebody has left it."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_lopd.artifacts.fingerprint import fingerprint_model
from megatron_lopd.artifacts.lineage import artifact_parent, model_parent
from megatron_lopd.artifacts.manifest import load_manifest, write_manifest
from megatron_lopd.cli import main
from megatron_lopd.config import load_recipe
from megatron_lopd.data.chat import Chat
from megatron_lopd.data.dataset import open_shards
from megatron_lopd.data.schemas import ROLLOUTS
from megatron_lopd.evaluation.answers import read_answers
from megatron_lopd.files.reading import read_object
from megatron_lopd.pipeline.resolved import ResolvedRun
from tests.fault.test_lineage import refused


def test_verify_walks_the_whole_run(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "run"]) == 0
    out = capsys.readouterr().out
    for stage in ("generate", "sft", "rollout", "score", "train", "export", "evaluate", "report"):
        assert f"run/{stage}: " in out
    artifacts = len(re.findall(r", intact$", out, flags=re.M))
    assert out.splitlines()[-1] == f"run: {artifacts} artifacts, proved"
    manifest = load_manifest(root / "run/rollout")
    counts = manifest.counts | {"samples": 41}
    write_manifest(root / "run/rollout", replace(manifest, counts=counts))  # whole, but not the one scored
    refused(capsys, ["verify", "run"], 3, "rollout")


def test_what_was_made_from_something_that_is_gone_is_named_with_it(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(root / "run/rollout")
    for path in ("run", "run/score"):
        refused(
            capsys, ["verify", path], 1, "run/score: made from rollout, and no committed artifact is there"
        )


@pytest.mark.parametrize("path", [".", "..", "../model", "../../sft", "../..", "../../sft/model/../model"])
def test_verify_may_be_asked_from_within(root: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(root / "run/sft/model")
    assert main(["verify", path]) == 0


def test_a_run_may_be_in_a_folder_of_any_name(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.rename(root.with_name(os.fsdecode(b"caf\xe9"))))
    assert main(["verify", "run"]) == 0
    assert main(["run", "recipe.yaml"]) == 0


def test_verify_says_of_anything_why_it_is_what_it_is(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "run/export/model"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("run/export/model: model ")
    assert out[0].endswith(", intact")
    assert "  generate: proved: this teacher answered: weights " in out[1]
    for stage, said in (
        ("sft", "the SFT data's teacher is the one that answered"),
        ("rollout", "the student that sampled is what sft made"),
        ("score", "the teacher that scores is the teacher that answered"),
        ("score", "teacher and student share one tokenizer and one chat template"),
        ("train", "the student that sampled is the student being trained"),
        ("export", "export was made from this train"),
    ):
        assert any(line.startswith(f"  {stage}: proved: {said}: ") for line in out), said
    assert out[-2].endswith("run/export: proved, because of all that it rests on")
    (root / "run").rename(root / "refresh-100")  # a name like a round's
    assert main(["verify", "refresh-100"]) == 0
    assert main(["verify", "refresh-100/export/model"]) == 0
    (root / "refresh-100").rename(root / "run")
    capsys.readouterr()
    (checkpoint,) = (root / "run/train/checkpoints").glob("*5")
    assert main(["verify", str(checkpoint.relative_to(root))]) == 0
    assert "proved: it is of the job that was begun here: plan " in capsys.readouterr().out
    shutil.copytree(root / "run/export/model", root / "released")
    assert main(["verify", "released"]) == 0
    own, verdict = capsys.readouterr().out.splitlines()
    assert own.startswith("released: weights ")
    assert own.endswith(", says of itself: made by train, proved")
    assert verdict.startswith("released: declared: lopd_lineage.json says so, and the artifact")
    refused(capsys, ["verify", "teacher"], 1, "teacher: neither an artifact, a run directory nor a model")
    refused(
        capsys, ["verify", "run/train/tensorboard"], 1, "no part of run/train: its manifest lists nothing"
    )


def test_no_artifact_calls_itself_better_than_what_it_rests_on(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever changed them knew how to write manifests, and wrote both of them anew."""
    for stage, lineage in (("rollout", "declared"), ("score", "proved")):
        directory = root / "run" / stage
        made = replace(load_manifest(directory), lineage=lineage)
        if stage == "score":
            parent = artifact_parent("rollout", load_manifest(root / "run/rollout"))
            made = replace(made, parents=made.parents | {"rollouts": parent})
        write_manifest(directory, made)
    assert main(["verify", "run/rollout"]) == 0
    refused(capsys, ["verify", "run/score"], 3, "run/score calls itself proved, yet it is declared that")
    made = load_manifest(root / "run/rollout")
    other = model_parent("student", fingerprint_model("student"))
    write_manifest(root / "run/rollout", replace(made, parents=made.parents | {"student": other}))
    refused(capsys, ["verify", "run/rollout"], 3, "calls itself declared, yet it is overridden that")


def test_verify_tells_a_shard_that_another_plan_made(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A manifest may list it, and every byte be as that says."""
    made = load_manifest(root / "run/rollout")
    write_manifest(root / "run/rollout", replace(made, config=made.config | {"seed": 12345}))
    refused(capsys, ["verify", "run/rollout"], 1, "rollouts-00000.arrow: another plan made it (")


def test_inspect_shows_what_was_sampled(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rollout = next(iter(open_shards(ROLLOUTS, root / "run/rollout")))
    assert main(["inspect", "run/rollout", "--samples", "1"]) == 0
    out = capsys.readouterr().out
    chat = Chat(str(root / "run/sft/model"))
    for shown in ("lineage proved", rollout.sample_id, repr(chat.tokenizer.decode(rollout.response_tokens))):
        assert shown in out
    assert main(["inspect", "run/score/scores-00000.arrow"]) == 0
    assert rollout.sample_id in capsys.readouterr().out
    refused(capsys, ["inspect", "teacher"], 1, "teacher", "nothing to inspect")
    assert main(["inspect", "run"]) == 0
    out = capsys.readouterr().out
    for stage in ("generate: rollouts, proved", "train: checkpoint, proved", "evaluate: evaluation, proved"):
        assert f"  {stage}" in out


def test_an_evaluation_can_be_read(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ResolvedRun(load_recipe("recipe.yaml")).evaluation_sets["eval"].prompts
    results = read_object(root / "run/evaluate/results.json")
    for model in ("sft", "lightning_opd"):
        answers = list(read_answers(root / f"run/evaluate/{model}/eval/answers.jsonl"))
        assert [each.id for each in answers] == [f"{prompt.id}/0" for prompt in prompts] * 2
        assert [each.gold for each in answers] == [prompt.answer for prompt in prompts] * 2
        right = [each.verdict == "right" for each in answers if each.mode == "sampled"]
        assert sum(right) / len(right) == results["accuracy"]["eval"][model]["sampled"]
    assert results["paired"]["eval"]["problems"] == len(prompts)
    assert main(["inspect", "run/evaluate", "--samples", "1"]) == 0
    out = capsys.readouterr().out
    for shown in (
        f"{prompts[0].id}/0 (sampled): ",
        repr(prompts[0].messages[0]["content"]),
        "right answer: ",
    ):
        assert shown in out
    assert prompts[1].id not in out
    assert "answer read" not in out  # which this grader does not
