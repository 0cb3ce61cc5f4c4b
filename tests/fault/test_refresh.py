"""Rollouts refreshed twice on the way: what is sampled, what is proved, and that no kill changes a bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from megatron_lopd.artifacts.manifest import load_manifest, write_manifest
from megatron_lopd.cli import main
from megatron_lopd.data.batch_plan import BatchPlan
from megatron_lopd.data.dataset import open_shards
from megatron_lopd.data.schemas import ROLLOUTS
from megatron_lopd.pipeline import shard_jobs as sampling
from megatron_lopd.pipeline.shard_jobs import sample_seed
from megatron_lopd.training.checkpoints import Checkpoints
from tests.fault import test_kill
from tests.fault.test_kill import SECONDS, interrupt, lines, start
from tests.fault.test_lineage import refused
from tests.model_zoo import make_model_dir
from tests.pipeline import SMALL, write_recipe

# Batches of 8 of 40 samples, so that the last round goes on into a second epoch; rounds of 3, 3 and 2 steps.
STEPS, EVERY, BATCH, SAMPLES = 8, 3, 8, 40
NO_REPORT = "prompts.eval=null"
OVERRIDES = ("train.keep_checkpoints=1", NO_REPORT)  # the newest is all that a refresh needs
BEFORE_TRAIN = ("generate", "sft", "rollout", "score")


@pytest.fixture(scope="module")
def refreshed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with two refreshes, to be copied and never changed."""
    root = tmp_path_factory.mktemp("refreshed")
    path = write_recipe(root)
    recipe = yaml.safe_load(path.read_text())
    recipe["train"] |= {"steps": STEPS, "refresh_every": EVERY, "keep_checkpoints": 10}
    recipe["prompts"]["opd"]["count"] = SAMPLES // 2
    recipe["rollout"]["sampling"] = recipe["rollout"]["sampling"] | {"samples_per_prompt": 2}
    recipe["train"]["optimizer"] = {"lr": 1e-3, "schedule": "linear"}
    path.write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["run", path.name]) == 0
    return root


@pytest.fixture
def root(refreshed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(refreshed, copy)
    monkeypatch.chdir(copy)
    return copy


def untrained(root: Path) -> None:
    """As a run is before train."""
    for path in (root / "run").iterdir():
        if path.name not in BEFORE_TRAIN:
            shutil.rmtree(path)


def back_to(root: Path, step: int) -> None:
    """As a kill after the checkpoint at `step` leaves it, but for what was refreshed later."""
    (root / "run/train/manifest.json").unlink()
    for path in (root / "run/train/checkpoints").iterdir():
        if int(path.name.partition("_")[2]) > step:
            shutil.rmtree(path)


def outcome(run: Path) -> dict[str, object]:
    files = [*run.rglob("*.arrow"), *run.glob("*/model/*.safetensors"), *run.glob("*/*/model/*.safetensors")]
    files += [*run.glob("refresh-*/*/manifest.json"), *run.glob("train/manifest.json")]
    rows = [json.loads(line) for line in (run / "train/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    made = {str(path.relative_to(run)): path.read_bytes() for path in files}
    return {name: content for name, content in made.items() if not name.startswith("evaluate")} | {
        "losses": [(row["loss"], row["grad_norm"], row["lr"], row["drift_kl"]) for row in rows]
    }


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "a shard of the first refresh's rollouts": lambda run: any(run.glob("refresh-01/rollout/*rollouts-*")),
    "a step in the middle of the second round": lambda run: lines(run / "train/metrics.jsonl") >= 5,
    "the second refresh's scores": lambda run: any(run.glob("refresh-02/score/*scores-*")),
}


@pytest.mark.timeout(600)  # four starts of the command
def test_kill_9_in_train_and_in_the_refreshes_changes_nothing(refreshed: Path, root: Path) -> None:
    untrained(root)
    for moment, reached in MOMENTS.items():
        assert interrupt(root, reached, signal.SIGKILL, *OVERRIDES) == -signal.SIGKILL, moment
    assert start(root, *OVERRIDES).wait(SECONDS) == 0, (root / "log").read_text()
    expected, found = outcome(refreshed / "run"), outcome(root / "run")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert not list((root / "run").rglob(".tmp-*"))


@pytest.mark.nightly  # eight starts of a command
@pytest.mark.timeout(1300)
def test_where_there_is_a_gpu_others_do_the_stages_and_end_alike(
    refreshed: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name in CUDA_VISIBLE_DEVICES is a fake GPU: it is all that `lopd run` looks at, to leave it alone."""
    untrained(root)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-fake")
    monkeypatch.setattr(test_kill, "SECONDS", 5 * SECONDS)  # that many starts
    in_round_two = MOMENTS["a step in the middle of the second round"]
    assert interrupt(root, in_round_two, signal.SIGTERM, *OVERRIDES) == 75
    assert start(root, *OVERRIDES).wait(5 * SECONDS) == 0, (root / "log").read_text()
    said = [line for line in (root / "log").read_text().splitlines() if line.startswith("lopd train: ")]
    assert len(said) == len(set(said)) >= 2, "rollouts were due, and it was asked to stop: each said once"
    assert (root / "log").read_text().count("lopd run: ") == 1
    expected, found = outcome(refreshed / "run"), outcome(root / "run")
    assert [name for name in expected | found if found.get(name) != expected.get(name)] == []


def test_a_round_samples_what_its_steps_visit_and_no_more(refreshed: Path) -> None:
    whole = open_shards(ROLLOUTS, refreshed / "run/rollout").sample_ids
    plan = BatchPlan(SAMPLES, BATCH, seed=5)
    for name, steps in (("refresh-01", range(3, 6)), ("refresh-02", range(6, 8))):
        sampled = open_shards(ROLLOUTS, refreshed / "run" / name / "rollout")
        visited = {whole[int(position)] for step in steps for position in plan.samples(step)}
        assert sorted(sampled.sample_ids[index] for index in range(len(sampled))) == sorted(visited)
        assert len(visited) < SAMPLES


def test_the_report_sums_what_the_refreshes_took(refreshed: Path) -> None:
    summary = json.loads((refreshed / "run/report/summary.json").read_text())
    scores = [load_manifest(refreshed / f"run/refresh-0{number}/score") for number in (1, 2)]
    assert summary["refreshes"] == 2
    assert summary["tokens"]["refresh score"] == sum(score.counts["tokens"] for score in scores)
    assert {"refresh student", "refresh rollout", "refresh score"} <= set(summary["seconds"])
    seconds = [json.loads(line)["seconds"] for line in (refreshed / "run/train/times.jsonl").open()]
    assert summary["seconds"]["train"] >= round(sum(seconds), 2) - 0.01, "all rounds of it, not the last"
    statements = [proof["statement"] for proof in summary["proofs"]]
    assert sum(text.startswith("refresh 2: the teacher that scores") for text in statements) == 1


def test_the_schedule_is_one_over_all_rounds(refreshed: Path) -> None:
    rates = [json.loads(line)["lr"] for line in (refreshed / "run/train/metrics.jsonl").open()]
    falls = [before - after for before, after in pairwise(rates)]
    assert falls == pytest.approx([1e-3 / STEPS] * (STEPS - 1))


def test_train_alone_stops_for_each_refresh(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, streams = outcome(root / "run"), set()

    def seed_of(seed: int, stream: str, sample_id: str) -> int:
        streams.add(stream)
        return sample_seed(seed, stream, sample_id)

    monkeypatch.setattr(sampling, "sample_seed", seed_of)
    untrained(root)
    refused(capsys, ["refresh", "recipe.yaml"], 1, "step 3", "run lopd train")
    for step in (3, 6):
        refused(capsys, ["train", "recipe.yaml"], 75, f"step {step} of 8", "lopd refresh", "lopd run")
        assert main(["refresh", "recipe.yaml"]) == 0
    assert main(["train", "recipe.yaml"]) == 0
    assert main(["refresh", "recipe.yaml"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(["run", "recipe.yaml", NO_REPORT]) == 0
    assert outcome(root / "run") == expected
    assert streams == {"rollout 1", "rollout 2"}, "each round draws with seeds of its own"


def test_a_stop_signal_at_the_end_of_a_round_stops_the_run(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    untrained(root)
    commit = Checkpoints.commit

    def commit_and_ask(self: Checkpoints, *arguments: object) -> None:
        commit(self, *arguments)  # type: ignore[arg-type]
        if (self.directory / "step_00000003").exists():
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, "commit", commit_and_ask)
    refused(capsys, ["run", "recipe.yaml"], 75, "on request after step 3 of 8")
    assert not (root / "run/refresh-01").exists()


def test_a_tampered_refresh_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = next((root / "run/refresh-01/rollout").glob("*.arrow"))
    intact = shard.read_bytes()
    shard.write_bytes(intact[:-20] + bytes([intact[-20] ^ 64]) + intact[-19:])
    for arguments in (["run", "recipe.yaml"], ["verify", "run"]):
        refused(capsys, arguments, 1, "refresh-01/rollout", "damaged")
    shard.write_bytes(intact)
    assert main(["verify", "run"]) == 0
    score = load_manifest(root / "run/refresh-01/score")
    write_manifest(root / "run/refresh-01/score", replace(score, counts=score.counts | {"samples": 1}))
    refused(capsys, ["run", "recipe.yaml"], 3, "refresh-01/score", "changed")
    refused(capsys, ["verify", "run"], 3, "refresh-01/score")
    back_to(root, 4)  # in the middle of the round that trains from it
    refused(capsys, ["train", "recipe.yaml"], 3, "refresh-01/score", "changed since train began with it")


def test_a_student_of_another_step_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    back_to(root, 6)
    shutil.rmtree(root / "run/refresh-02")
    shutil.copytree(root / "run/refresh-01", root / "run/refresh-02")
    refused(capsys, ["train", "recipe.yaml"], 3, "refresh-02/student", "step 3", "step 6")
    made = load_manifest(root / "run/refresh-02/student")
    stepless = {name: value for name, value in made.config.items() if name != "step"}
    write_manifest(root / "run/refresh-02/student", replace(made, config=stepless))
    refused(capsys, ["train", "recipe.yaml"], 1, "student/manifest.json: damaged: no 'step' in its config")


def test_another_teacher_may_not_score_a_refresh(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model_dir(root / "other", seed=9, **SMALL)
    back_to(root, 6)
    shutil.rmtree(root / "run/refresh-02/score")
    refused(capsys, ["refresh", "recipe.yaml", "teacher.model=other"], 3, "weights", "other")
    assert not (root / "run/refresh-02/score").exists()
    overridden = ["teacher.model=other", "allow_teacher_mismatch=true"]
    assert main(["refresh", "recipe.yaml", *overridden]) == 0
    (root / "run/train/refreshes.json").unlink()
    refused(capsys, ["train", "recipe.yaml"], 3, "teacher", "other", "allow_teacher_mismatch=true")
    assert main(["train", "recipe.yaml", "allow_teacher_mismatch=true"]) == 0
    assert load_manifest(root / "run/train").lineage == "overridden"


def test_a_refresh_needs_its_teacher(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(root / "teacher")
    assert main(["run", "recipe.yaml"]) == 0, "every refresh is made: nobody asks for the teacher"
    back_to(root, 6)
    assert main(["train", "recipe.yaml"]) == 0
    back_to(root, 6)
    shutil.rmtree(root / "run/refresh-02")
    for command in ("run", "train", "refresh"):
        refused(capsys, [command, "recipe.yaml"], 2, "train.refresh_every", "teacher")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.refresh_every=0"], "at least 1"),
        (["train.refresh_every=8"], "below train.steps=8"),
        (["train.steps=null", "train.epochs=1"], "needs train.steps"),
        (["teacher=null"], "needs the teacher"),
    ],
)
def test_what_cannot_be_refreshed(
    root: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], expected: str
) -> None:
    refused(capsys, ["run", "recipe.yaml", *overrides], 2, "train.refresh_every", expected)
