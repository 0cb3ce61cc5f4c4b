"""What a stage reads of the run's own artifacts changes before it, while it works, or after."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from blake3 import blake3

from megatron_lopd.artifacts.lineage import artifact_parent
from megatron_lopd.artifacts.manifest import FileEntry, Manifest, load_manifest, write_manifest
from megatron_lopd.artifacts.stamps import TICK
from megatron_lopd.cli import main
from megatron_lopd.config import PromptSource, load_recipe
from megatron_lopd.errors import DataError
from megatron_lopd.files.digests import sha256_file
from megatron_lopd.pipeline.proofs import prove_training
from megatron_lopd.pipeline.resolved import ResolvedRun
from megatron_lopd.pipeline.stage import Output, Plan, Stage
from megatron_lopd.prompts.sources import PromptSet
from megatron_lopd.report import page
from megatron_lopd.stages import report
from megatron_lopd.stages.evaluate import EvaluateStage
from megatron_lopd.stages.export import ExportStage
from megatron_lopd.stages.tokenize import TokenizeStage
from tests.fault.test_lineage import refused, undo

AFTER_TRAIN = ("export", "evaluate", "report")


def edit(path: Path) -> None:
    """As somebody would who wants the model to be read differently, each file still being one of its kind."""
    if path.suffix == ".jinja":
        path.write_text("Think. " + path.read_text())
    else:
        content = json.loads(path.read_text())
        content["rope_parameters" if path.name == "config.json" else "clean_up_tokenization_spaces"] = (
            {"rope_theta": 5e6, "rope_type": "default"} if path.name == "config.json" else True
        )
        path.write_text(json.dumps(content))


READ = [
    (ExportStage, "sft/model/config.json"),
    (ExportStage, "sft/model/chat_template.jinja"),
    (EvaluateStage, "export/model/config.json"),
    (EvaluateStage, "sft/model/chat_template.jinja"),
    (EvaluateStage, "generate/tokenizer/tokenizer_config.json"),
]


@pytest.mark.parametrize(("stage", "name"), READ)
def test_what_was_edited_before_is_refused(
    root: Path, capsys: pytest.CaptureFixture[str], stage: type[Stage], name: str
) -> None:
    undo(root, *AFTER_TRAIN[AFTER_TRAIN.index(stage.name) :])
    edit(root / "run" / name)
    refused(capsys, [stage.name, "recipe.yaml"], 1, f"run/{name}: damaged")
    assert not (root / "run" / stage.name / "manifest.json").exists()


@pytest.mark.parametrize(("stage", "name"), READ)
def test_what_is_edited_while_a_stage_works_is_refused(
    root: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    stage: type[Stage],
    name: str,
) -> None:
    """It is read by its path, after all was hashed."""
    undo(root, *AFTER_TRAIN[AFTER_TRAIN.index(stage.name) :])
    commit = stage.commit

    def edited_first(self: Stage, run: ResolvedRun, plan: Plan) -> Output:
        edit(root / "run" / name)
        return commit(self, run, plan)

    monkeypatch.setattr(stage, "commit", edited_first)
    refused(capsys, [stage.name, "recipe.yaml"], 1, name)
    assert not (root / "run" / stage.name / "manifest.json").exists()


def rewritten(directory: Path, manifest: Manifest, *names: str) -> Manifest:
    """`manifest` with files as they are now, as somebody writes it who knows how."""
    entries = {
        name: FileEntry(
            (directory / name).stat().st_size, blake3((directory / name).read_bytes()).hexdigest()
        )
        for name in names
    }
    return replace(manifest, files=manifest.files | entries)


def test_verify_tells_an_export_that_speaks_differently(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole artifact, of which every digest is right, whoever wrote it."""
    assert main(["verify", "run/export"]) == 0
    assert "  export: proved: it speaks as that student does: tokenizer " in capsys.readouterr().out
    export, lineage = root / "run/export", root / "run/export/model/lopd_lineage.json"
    said = json.loads(lineage.read_text())
    said["model"]["chat_template"] = "f" * 64
    lineage.write_text(json.dumps(said))
    write_manifest(export, rewritten(export, load_manifest(export), "model/lopd_lineage.json"))
    refused(capsys, ["verify", "run/export"], 3, "overridden that it speaks as that student does")


def test_verify_walks_from_an_evaluation_to_all_that_it_rests_on(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", "run/report"]) == 0
    out = capsys.readouterr().out
    for stage in ("generate", "sft", "rollout", "score", "train", "export", "evaluate"):
        assert f"  {stage}: proved: " in out
    made = load_manifest(root / "run/score")
    write_manifest(root / "run/score", replace(made, counts=made.counts | {"samples": 41}))
    refused(capsys, ["verify", "run/evaluate"], 3, "run/score now holds")


def test_text_from_a_file_is_the_text_that_was_hashed(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(answer: str) -> None:
        messages = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": answer}]
        Path("sft.jsonl").write_text(json.dumps({"messages": messages}))

    commit, edited = TokenizeStage.commit, []

    def edited_first(self: TokenizeStage, run: ResolvedRun, plan: Plan) -> Output:
        write("3")
        edited.append(True)
        return commit(self, run, plan)

    write("2")
    arguments = ["recipe.yaml", "run_dir=run2", "sft.data=sft.jsonl", "sft.teacher=teacher"]
    with monkeypatch.context() as patch:
        patch.setattr(TokenizeStage, "commit", edited_first)
        refused(capsys, ["tokenize", *arguments], 1, "sft.jsonl: changed since it was hashed")
    assert edited
    assert main(["tokenize", *arguments]) == 0
    data = load_manifest(root / "run2/tokenize").parents["data"]
    assert data.digests["sha256"] == sha256_file(root / "sft.jsonl")


def test_prompts_are_those_that_the_parent_was_told_of(tmp_path: Path) -> None:
    """What was hashed before need not be read to be told of, and is read later."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n')
    time.sleep(2 * TICK / 1e9)  # else its digest is not kept
    source = PromptSource(path=str(path))
    first = PromptSet(source, "opd", 0)
    assert first.prompts
    assert first.parent
    later = PromptSet(source, "opd", 0)
    assert later.parent == first.parent
    path.write_text('{"prompt": "two"}\n')
    with pytest.raises(DataError, match=r"prompts\.jsonl: changed since it was hashed"):
        later.prompts  # noqa: B018


def test_a_checkpoint_is_weighed_again_while_it_is_there(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = yaml.safe_load((root / "recipe.yaml").read_text())
    recipe |= {"run_dir": "taken", "sft": {"checkpoint": "run/sft/model"}}
    (root / "elsewhere.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["sft", "elsewhere.yaml"]) == 0
    capsys.readouterr()
    taught = "  sft: proved: teacher taught run/sft/model: lopd_lineage.json in it, and the artifact that it"
    assert main(["verify", "taken/sft"]) == 0
    assert f"{taught} names\n" in capsys.readouterr().out
    (root / "run/generate").rename(root / "run/away")
    lost = "run/generate, which it was made from, is not there as it was"
    refused(capsys, ["verify", "taken/sft"], 3, "taken/sft was proved by the lineage of run/sft/model", lost)
    refused(capsys, ["sft", "elsewhere.yaml"], 3, "taken/sft was proved when it was made, and is declared")
    (root / "run/away").rename(root / "run/generate")
    lineage = root / "run/sft/model/lopd_lineage.json"
    lineage.rename(root / "away")
    refused(capsys, ["verify", "taken/sft"], 3, "lopd_lineage.json is missing")
    (root / "run/sft/model").rename(root / "model")
    assert main(["verify", "taken/sft"]) == 0
    assert f"{taught} names, when it was made: the model is not" in capsys.readouterr().out


def test_answers_are_read_as_what_was_committed(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put back before the report is committed, they would not be missed by it."""
    undo(root, "report")
    answers, summary, render = root / "run/evaluate/sft/eval/answers.jsonl", report._summary, page.render_page
    text = answers.read_text()

    def edited_first(*given: Any) -> dict[str, Any]:
        answers.write_text(text.replace('"sampled"', '"greedy"'))
        return summary(*given)

    def put_back_first(*given: Any) -> str:
        answers.write_text(text)
        return render(*given)

    monkeypatch.setattr(report, "_summary", edited_first)
    monkeypatch.setattr(page, "render_page", put_back_first)
    refused(capsys, ["report", "recipe.yaml"], 1, "answers.jsonl: damaged")
    refused(capsys, ["inspect", "run/evaluate"], 1, "answers.jsonl: damaged")


def test_an_artifact_made_from_itself_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage, parent in (("sft", "sft"), ("rollout", "score"), ("generate", "train")):
        made = load_manifest(root / "run" / stage)
        other = artifact_parent(parent, load_manifest(root / "run" / parent))
        write_manifest(root / "run" / stage, replace(made, parents=made.parents | {"a": other}))
        refused(capsys, ["verify", f"run/{stage}"], 1, "which was made from it")
        write_manifest(root / "run" / stage, made)


def test_a_manifest_that_lacks_what_is_asked_of_it_is_refused(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the right kind and with every digest right, it is no manifest that a stage wrote."""
    run = ResolvedRun(load_recipe("recipe.yaml"))
    for stage, role in (("score", "rollouts"), ("score", "teacher"), ("rollout", "sft")):
        made = load_manifest(root / "run" / stage)
        parents = {name: parent for name, parent in made.parents.items() if name != role}
        write_manifest(root / "run" / stage, replace(made, parents=parents))
        with pytest.raises(
            DataError, match=f"run/{stage}/manifest.json: damaged: no '{role}' in its parents"
        ):
            prove_training(run, run.start.parent)
        refused(capsys, ["verify", f"run/{stage}"], 1, f"run/{stage}/")
        write_manifest(root / "run" / stage, made)
    for part in (made.config, made.counts, made.parents["sft"].digests):
        with pytest.raises(DataError, match=r"rollout/manifest\.json: damaged: no 'nothing' in its "):
            part["nothing"]
