"""A finished run is tampered with in every way that matters; each is refused, and says what differs."""

from __future__ import annotations

import json
import os
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from megatron_lopd.artifacts.fingerprint import fingerprint_model
from megatron_lopd.artifacts.lineage import OVERRIDE, read_model_lineage
from megatron_lopd.artifacts.manifest import load_manifest
from megatron_lopd.cli import main
from megatron_lopd.prompts.arithmetic import problems
from tests.model_zoo import make_model_dir
from tests.pipeline import SMALL, write_recipe

AFTER_ROLLOUT = ("score", "train", "export", "evaluate", "report")


def undo(root: Path, *stages: str) -> None:
    for stage in stages:
        shutil.rmtree(root / "run" / stage)


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, *expected: str) -> None:
    capsys.readouterr()
    assert main(arguments) == code
    message = capsys.readouterr().err.strip().splitlines()[-1]
    for text in expected:
        assert text in message


def test_a_second_run_does_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def files() -> dict[Path, int]:
        found = (root / "run").rglob("*.*")
        return {path: path.stat().st_mtime_ns for path in found}

    before = files()
    assert main(["run", "recipe.yaml"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert files() == before


def test_the_report_says_proved(root: Path) -> None:
    summary = json.loads((root / "run/report/summary.json").read_text())
    assert summary["lineage"] == "proved"
    assert summary["seed"] == 5
    assert set(summary["accuracy"]) == {"eval"}
    assert set(summary["accuracy"]["eval"]) == {"sft", "lightning_opd"}
    stages = {"generate", "sft", "rollout", "score", "train", "evaluate"}
    assert stages <= set(summary["seconds"])
    assert stages <= set(summary["tokens"])


def test_another_teacher_may_not_score(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    undo(root, *AFTER_ROLLOUT)
    make_model_dir(root / "other", seed=9, **SMALL)
    refused(capsys, ["score", "recipe.yaml", "teacher.model=other"], 3, "weights", "other", "teacher")
    another = "the teacher of generate is not what it was made with: weights was "
    refused(capsys, ["generate", "recipe.yaml", "teacher.model=other"], 3, another)
    assert not (root / "run/score").exists()
    shutil.rmtree(root / "teacher")
    shutil.move(root / "other", root / "teacher")  # the same name, another model
    refused(capsys, ["run", "recipe.yaml"], 3, "weights", "teacher")
    assert not (root / "run/score").exists()


def test_the_override_is_written_into_everything_after_it(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    undo(root, *AFTER_ROLLOUT)
    make_model_dir(root / "other", seed=9, **SMALL)
    arguments = ["run", "recipe.yaml", "teacher.model=other", "allow_teacher_mismatch=true"]
    assert main(arguments) == 0
    for stage in AFTER_ROLLOUT:
        assert load_manifest(root / "run" / stage).lineage == "overridden"
    assert load_manifest(root / "run/rollout").lineage == "proved"
    exported = read_model_lineage(root / "run/export/model")
    assert exported is not None
    assert exported.status == "overridden"
    assert json.loads((root / "run/report/summary.json").read_text())["lineage"] == "overridden"
    capsys.readouterr()
    assert main(["verify", "run/export"]) == 0
    assert f"; {OVERRIDE} let it pass\n" in (out := capsys.readouterr().out)
    assert "run/export: overridden, because the teacher that scores is the teacher that answered; " in out


@pytest.mark.parametrize("stage", ["rollout", "score"])
def test_a_flipped_byte_of_a_shard_is_named(
    root: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    undo(root, "train", "export", "evaluate", "report")
    shard = sorted((root / "run" / stage).glob("*.arrow"))[1]
    before = shard.stat()
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    refused(capsys, ["train", "recipe.yaml"], 1, str(shard.relative_to(root)), "damaged")
    assert not (root / "run/train").exists()
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))  # as bit rot leaves it
    refused(capsys, ["train", "recipe.yaml"], 1, str(shard.relative_to(root)), "damaged")
    assert not (root / "run/train/checkpoints").exists()


def test_a_committed_run_notices_an_edited_shard(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = next((root / "run/generate").glob("*.arrow"))
    data = bytearray(shard.read_bytes())
    data[-20] ^= 64
    shard.write_bytes(data)
    refused(capsys, ["run", "recipe.yaml"], 1, shard.name, "damaged")
    refused(capsys, ["verify", "run"], 1, shard.name, "damaged")


def test_train_refuses_another_sft_checkpoint(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    undo(root, "train", "export", "evaluate", "report")
    refused(
        capsys,
        ["train", "recipe.yaml", "train.checkpoint=student"],
        3,
        "the student that sampled is the student being trained",
        "weights",
        "run/sft/model",
        "student",
        "allow_teacher_mismatch=true",
    )
    weights = root / "run/sft/model/model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] += 1
    save_file(tensors, weights, {"format": "pt"})
    refused(capsys, ["train", "recipe.yaml"], 1, "run/sft/model/model.safetensors", "damaged")


def test_a_changed_chat_template_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    undo(root, *AFTER_ROLLOUT)
    template = root / "teacher/chat_template.jinja"
    template.write_text(template.read_text() + " ")
    refused(capsys, ["score", "recipe.yaml"], 3, "chat_template")
    undo(root, "rollout")
    template.write_text(template.read_text()[:-1])
    template = root / "run/sft/model/chat_template.jinja"
    template.write_text(template.read_text() + " ")
    refused(capsys, ["rollout", "recipe.yaml"], 1, "chat_template.jinja", "damaged")


def test_changed_settings_are_refused_by_name(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, ["run", "recipe.yaml", "sft.optimizer.lr=0.5"], 3, "optimizer.lr=0.001", "0.5")
    assert main(["run", "recipe.yaml", "train.checkpoint_every=1"]) == 0


def test_what_was_begun_is_not_mixed_with_other_settings(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    undo(root, *AFTER_ROLLOUT)
    (root / "run/rollout/manifest.json").unlink()  # as a kill just before the commit leaves it
    refused(
        capsys, ["rollout", "recipe.yaml", "rollout.sampling.temperature=0.5"], 3, "temperature=1.0", "0.5"
    )
    assert main(["rollout", "recipe.yaml"]) == 0


def test_a_stage_made_again_is_the_same_artifact(root: Path) -> None:
    undo(root, "train")
    assert main(["run", "recipe.yaml"]) == 0  # export, evaluate and report still stand on it


def test_training_needs_no_teacher(root: Path) -> None:
    undo(root, "train", "export", "evaluate", "report")
    shutil.rmtree(root / "teacher")
    assert main(["run", "recipe.yaml"]) == 0
    assert load_manifest(root / "run/train").lineage == "proved"


def test_a_checkpoint_made_elsewhere_is_declared_or_proves_itself(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model_dir(root / "foreign", seed=3, **SMALL)
    recipe = yaml.safe_load((root / "recipe.yaml").read_text())
    recipe |= {"run_dir": "run2", "sft": {"checkpoint": "foreign"}}
    (root / "elsewhere.yaml").write_text(yaml.safe_dump(recipe))
    refused(capsys, ["run", "elsewhere.yaml"], 2, "foreign", "sft.teacher")
    assert main(["run", "elsewhere.yaml", "sft.teacher=teacher"]) == 0
    for stage in ("sft", "rollout", "score", "train", "export"):
        assert load_manifest(root / "run2" / stage).lineage == "declared"
    assert main(["run", "elsewhere.yaml", "sft.checkpoint=run/sft/model", "run_dir=run3"]) == 0
    assert load_manifest(root / "run3/train").lineage == "proved"


def test_a_lineage_is_worth_what_its_own_artifact_bears_out(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = yaml.safe_load((root / "recipe.yaml").read_text())
    recipe |= {"sft": {"checkpoint": "run/sft/model"}}
    (root / "elsewhere.yaml").write_text(yaml.safe_dump(recipe))

    def lineage(run_dir: str, *overrides: str) -> str:
        assert main(["sft", "elsewhere.yaml", f"run_dir={run_dir}", *overrides]) == 0
        return load_manifest(root / run_dir / "sft").lineage

    assert lineage("whole") == "proved"
    shutil.copytree(root / "run/sft/model", root / "copied")
    assert lineage("of-a-copy", "sft.checkpoint=copied") == "declared"
    make_model_dir(root / "forged", seed=3, **SMALL)
    written = json.loads((root / "copied/lopd_lineage.json").read_text())
    written["model"] = fingerprint_model(root / "forged").parts()
    (root / "forged/lopd_lineage.json").write_text(json.dumps(written))
    assert lineage("by-hand", "sft.checkpoint=forged") == "declared"
    (root / "run/sft/model/added_tokens.json").write_text("{}")
    more = ["sft", "elsewhere.yaml", "run_dir=with-a-file-more"]
    refused(capsys, more, 1, "run/sft/model/added_tokens.json: not part of ")
    (root / "run/sft/model/added_tokens.json").unlink()
    shutil.rmtree(root / "run/generate")
    assert lineage("without-its-data") == "declared"


@pytest.mark.parametrize(
    "overrides",
    [
        ["sft.checkpoint=run/sft/model", "teacher.model=other"],
        ["sft.checkpoint=run/sft/model", "train.checkpoint=other"],
        ["sft.checkpoint=run/sft/model", "teacher.model=voiced"],
        ["sft.checkpoint=student", "sft.teacher=other"],
        ["sft.data=sft.jsonl", "sft.teacher=other"],
    ],
)
def test_what_models_alone_tell_is_refused_before_anything_is_spent(
    root: Path, capsys: pytest.CaptureFixture[str], overrides: list[str]
) -> None:
    make_model_dir(root / "other", seed=9, **SMALL)
    shutil.copytree(root / "teacher", root / "voiced")
    with (root / "voiced/chat_template.jinja").open("a") as template:
        template.write(" ")
    messages = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]
    (root / "sft.jsonl").write_text(json.dumps({"messages": messages}))
    given = ["recipe.yaml", "run_dir=anew", *overrides]
    said = set()
    for command in (["run"], ["run", "--dry-run"], ["doctor"]):
        refused(capsys, [*command, *given], 3, "refused: ")
        assert main([*command, *given]) == 3
        said.add(capsys.readouterr().err.strip().splitlines()[-1].partition("refused: ")[2])
    assert len(said) == 1, "they do not say the same"
    assert not (root / "anew").exists()


def test_sft_text_from_a_file_has_a_declared_teacher(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conversations = [
        {"messages": [{"role": "user", "content": p.prompt}, {"role": "assistant", "content": p.solution}]}
        for p in problems(20, seed=0, split="sft")
    ]
    (root / "sft.jsonl").write_text("\n".join(map(json.dumps, conversations)))
    arguments = ["run", "recipe.yaml", "run_dir=run2", "sft.data=sft.jsonl"]
    refused(capsys, arguments, 2, "sft.jsonl", "sft.teacher=PATH")
    answer = {"role": "assistant", "content": "1 " * 30}
    long = {"messages": [conversations[0]["messages"][0], answer]}
    (root / "long.jsonl").write_text("\n".join(map(json.dumps, [*conversations, long])))
    too_long = ["tokenize", "recipe.yaml", "run_dir=run3", "sft.data=long.jsonl", "sft.teacher=teacher"]
    refused(capsys, too_long, 1, "long.jsonl:21: sample", "above the student's max_position_embeddings of 64")
    assert main([*arguments, "sft.teacher=teacher"]) == 0
    assert load_manifest(root / "run2/tokenize").counts["samples"] == 20
    for stage in ("tokenize", "sft", "rollout", "score", "train", "export", "report"):
        assert load_manifest(root / "run2" / stage).lineage == "declared"
    capsys.readouterr()
    assert main(["verify", "run2/export"]) == 0
    why = "teacher wrote sft.jsonl"
    assert f"  tokenize: declared: {why}: sft.teacher says so, and nothing else\n" in (
        out := capsys.readouterr().out
    )
    assert f"run2/export: declared, because {why}; " in out
    assert main(["verify", "run2"]) == 0
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(
        r"run2: \d+ artifacts, declared: evaluate, export, report, rollout, score and \d+ more", verdict
    )
    make_model_dir(root / "other", seed=9, **SMALL)
    shutil.rmtree(root / "run2/score")
    refused(
        capsys, ["score", *arguments[1:], "sft.teacher=teacher", "teacher.model=other"], 3, "weights", "other"
    )


def test_doctor_names_versions_and_the_plan(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "recipe.yaml", "run_dir=new"]) == 0
    out = capsys.readouterr().out
    for shown in (version("megatron-core"), version("torch"), "gloo", "tensor 1", "score"):
        assert shown in out
    refused(
        capsys, ["doctor", "recipe.yaml", "run_dir=new", "parallel.tensor=3", "parallel.processes=3"], 2, "3"
    )


def test_a_model_that_is_given_away_names_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "somebody's home"
    root.mkdir()
    recipe = write_recipe(root)
    (root / "sft.jsonl").write_text("".join(f'{{"prompt": "{at}+2*3"}}\n' for at in range(1, 9)))
    config = json.loads((root / "student/config.json").read_text())  # as libraries have written it
    (root / "student/config.json").write_text(json.dumps(config | {"_name_or_path": f"{root}/student"}))
    voice = json.loads((root / "teacher/tokenizer_config.json").read_text())
    noted = {
        "special_tokens_map_file": f"{root}/map.json",
        "tokenizer_file": "../somebody's home/tokenizer.json",
    }
    noted |= {"name_or_path": f"{root}/teacher/", "_name_or_path": "owner/model"}
    (root / "teacher/tokenizer_config.json").write_text(json.dumps(voice | noted))
    monkeypatch.chdir(tmp_path)
    places = {"run_dir": "run", "teacher.model": "teacher", "student.model": "student"}
    absolute = [f"{key}={json.dumps(f'{root}/{name}')}" for key, name in places.items()]
    prompts = "prompts.sft=" + json.dumps({"path": f"{root}/sft.jsonl"})
    for stage in ("generate", "sft"):
        assert main([stage, str(recipe), *absolute, prompts, "sft.steps=1"]) == 0
    model = root / "run/sft/model"
    for path in model.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path
        assert b"somebody" not in path.read_bytes(), path
    kept = json.loads((model / "tokenizer_config.json").read_text())
    assert (kept["name_or_path"], kept["_name_or_path"]) == ("teacher", "owner/model")
    lineage = json.loads((model / "lopd_lineage.json").read_text())
    assert lineage["teacher"]["path"] == "teacher"
    assert lineage["chain"]["generate"]["parents"]["prompts"]["path"] == "sft.jsonl"


def test_a_tokenizer_that_is_its_files_is_the_same_without_the_places_in_them(tmp_path: Path) -> None:
    """As one with code of its own is. Its student is given away without them, and must speak as it does."""
    make_model_dir(tmp_path, seed=1, **SMALL)
    (tmp_path / "own.py").write_text("class Own: ...\n")
    path = tmp_path / "tokenizer_config.json"
    said = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["own.Own", None]}}
    digests = set()
    for place in ("/somebody/model", "/other/model", "model"):
        path.write_text(json.dumps(said | {"name_or_path": place}))
        digests.add(fingerprint_model(tmp_path).tokenizer)
    assert len(digests) == 1
    path.write_text(json.dumps(said | {"name_or_path": "model", "model_max_length": 7}))
    assert fingerprint_model(tmp_path).tokenizer not in digests, "a tokenizer with code is its files"
