"""What binds a stage's directory, and that run, dry run, doctor and status say the same of it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from megatron_lopd.artifacts import digest_cache, stamps, weights_digest
from megatron_lopd.artifacts.manifest import load_manifest
from megatron_lopd.cli import main
from megatron_lopd.commands.run import STAGES
from megatron_lopd.config import load_recipe
from megatron_lopd.errors import LineageError
from megatron_lopd.files.reading import read_json
from megatron_lopd.pipeline.execute import LOCK_FILE, check_begun
from megatron_lopd.pipeline.plan_file import PLAN_FILE
from megatron_lopd.pipeline.resolved import ResolvedRun
from tests.pipeline import write_recipe

BY_NAME = {stage.name: stage for stage in STAGES}


def forget_from(root: Path, first: str) -> None:
    """Remove a stage's artifact and all behind it."""
    for stage in STAGES[STAGES.index(BY_NAME[first]) :]:
        shutil.rmtree(root / "run" / stage.name, ignore_errors=True)


def test_a_start_that_failed_leaves_its_advice_free_to_follow(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forget_from(root, "train")
    assert main(["train", "recipe.yaml", "train.preflight_tolerance=1e-12"]) == 3
    assert "raise train.preflight_tolerance" in capsys.readouterr().err
    assert (root / "run/train" / PLAN_FILE).is_file()
    assert main(["train", "recipe.yaml"]) == 0


@pytest.mark.parametrize("window", [5, 10])
def test_a_guard_stops_no_run_that_is_over_and_tells_what_it_saw(
    root: Path, capfd: pytest.CaptureFixture[str], window: int
) -> None:
    """Of five steps, a window's five are whole at the last, and ten are none."""
    forget_from(root, "train")
    guard = [f"train.guard.window={window}", "train.guard.max_drift_kl=1e-9"]
    assert main(["train", "recipe.yaml", *guard]) == 0
    seen = "over 5 steps, past train.guard.max_drift_kl=1e-09: at its end, so not stopped"
    assert seen in capfd.readouterr().err


def test_what_was_made_binds_and_a_plan_alone_does_not(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor does it where another worker has begun and is at work."""
    generate = root / "run/generate"
    shards = sorted(generate.glob("*.arrow"))
    kept = shards[0].read_bytes()
    for path in (*shards, generate / "manifest.json"):
        path.unlink()
    other = ["generate", "recipe.yaml", "generate.sampling.temperature=0.5"]
    with (generate / LOCK_FILE).open("w") as lock:  # as a worker that has begun holds it
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert main(other) == 3
        assert "was made with sampling.temperature=1.0, the recipe now says 0.5" in capsys.readouterr().err
    shards[0].write_bytes(kept)
    assert main(other) == 3
    shards[0].unlink()
    (generate / PLAN_FILE).write_text("{")  # nothing to go on from: nothing to lose
    assert main(other) == 0
    assert load_manifest(generate).config["sampling"]["temperature"] == 0.5


def test_what_another_release_began_is_not_said_to_be_of_another_model(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It took other digests of the same weights, and wrote no version."""
    generate = root / "run/generate"
    (generate / "manifest.json").unlink()
    begun = read_json(generate / PLAN_FILE)
    del begun["version"]
    begun["parents"]["teacher"]["digests"]["weights"] = "0" * 64
    (generate / PLAN_FILE).write_text(json.dumps(begun))
    for command in (["generate"], ["run"], ["run", "--dry-run"], ["doctor"]):
        assert main([command[0], "recipe.yaml", *command[1:]]) == 1, command
        assert "go on with the version of megatron-lopd that began it" in capsys.readouterr().err, command
    assert main(["status", "recipe.yaml"]) == 0


def test_run_dry_run_doctor_and_status_give_one_answer(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a stage that was begun, of one that is committed, and of those behind one that is refused."""
    assert main(["run", "recipe.yaml", "--dry-run"]) == 0  # so that its models are known: status hashes none
    capsys.readouterr()
    changed = "sft.optimizer.lr=0.5"
    (root / "run/sft/manifest.json").unlink()
    shutil.rmtree(root / "run/report")
    for command in (["run"], ["run", "--dry-run"], ["doctor"], ["sft"], ["sft", "--dry-run"]):
        assert main([command[0], "recipe.yaml", changed, *command[1:]]) == 3, command
        captured = capsys.readouterr()
        assert "was made with optimizer.lr=0.001, the recipe now says 0.5" in captured.err, command
        if "--dry-run" in command or command == ["doctor"]:
            assert "sft       [begun, by another recipe: refused: " in captured.out
            assert ("rollout   [not reached: sft is refused]" in captured.out) == (command[0] != "sft")
    assert not (root / "run/report").exists()
    assert main(["status", "recipe.yaml", changed]) == 0
    out = capsys.readouterr().out
    assert "(begun, by another recipe)" in out
    assert "train      committed: response tokens" in out
    assert "(not reached: sft is refused)" in out

    forget_from(root, "export")
    assert main(["run", "recipe.yaml", "train.optimizer.lr=0.5", "--dry-run"]) == 0  # sft is to go on first
    out = capsys.readouterr().out
    assert "train     [committed, to be compared with the recipe once sft is there]" in out


def test_looking_at_what_was_begun_hashes_no_model(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher has hundreds of gigabytes, and `lopd status` is asked again and again."""
    time.sleep(2 * stamps.TICK / 1e9)  # files as new as this copy's could change again unseen
    assert main(["run", "recipe.yaml", "--dry-run"]) == 0
    (root / "run/sft/manifest.json").unlink()
    monkeypatch.setenv(digest_cache.SESSION_VARIABLE, "")
    monkeypatch.setattr(digest_cache, "_start_of", lambda pid: "another command's")
    monkeypatch.setattr(weights_digest, "_digests", lambda *unused: pytest.fail("hashed"))
    for command in (["status"], ["run", "--dry-run"], ["sft", "--dry-run"]):
        assert main([command[0], "recipe.yaml", *command[1:]]) == 0, command


def test_nothing_is_spent_before_a_later_stage_is_known_to_be_refused(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forget_from(root, "evaluate")
    assert main(["run", "recipe.yaml", "train.optimizer.lr=0.5"]) == 3
    captured = capsys.readouterr()
    assert "run/train was made with optimizer.lr=0.001" in captured.err
    assert captured.out == ""


def test_a_stage_starts_the_ranks_that_the_recipe_says(root: Path) -> None:
    two = ["recipe.yaml", "parallel.tensor=2", "parallel.processes=2"]
    forget_from(root, "train")
    assert "RANK" not in os.environ
    assert main(["train", *two]) == 0
    assert main(["train", *two]) == 0  # nothing to do, and no ranks for it


def test_ranks_that_a_launcher_started_are_not_started_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "recipe.yaml"]) == 0
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(["sft", "recipe.yaml", "parallel.tensor=2", "parallel.processes=2"]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "needs a multiple of 2 processes, not 1" in message


def test_a_changed_setting_of_what_was_made_is_a_lineage_error(root: Path) -> None:
    (root / "run/train/manifest.json").unlink()
    with pytest.raises(LineageError, match="was made with"):
        check_begun(BY_NAME["train"], ResolvedRun(load_recipe("recipe.yaml", ["train.steps=9"])))
