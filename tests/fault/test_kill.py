"""`kill -9` in the middle of every stage: run again, it ends bit-identical to an undisturbed run."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from megatron_lopd.runtime import heartbeats
from tests.forks import Command
from tests.pipeline import write_recipe

COMMAND = [sys.executable, "-m", "megatron_lopd.cli", "run", "recipe.yaml"]
SECONDS = 120.0  # what ranks and engines start anew imports torch and Megatron-Core; this bounds a hang


def start(root: Path, *overrides: str) -> Command:
    return Command(root, ["run", "recipe.yaml", *overrides])


def finish(root: Path) -> None:
    assert start(root).wait(SECONDS) == 0, (root / "log").read_text()


def interrupt(root: Path, reached: Callable[[Path], bool], number: signal.Signals, *overrides: str) -> int:
    """Start the run, send `number` as soon as `reached`, and return how it ended."""
    return disturb(start(root, *overrides), root, reached, number)


def disturb(
    process: Command | subprocess.Popen[bytes],
    root: Path,
    reached: Callable[[Path], bool],
    number: signal.Signals,
) -> int:
    deadline = time.monotonic() + SECONDS
    while not reached(root / "run"):
        assert process.poll() is None, (root / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(number)
    return process.wait(SECONDS)


def outcome(run: Path) -> dict[str, object]:
    """What must come out the same: every sampled and scored byte, every loss, every exported weight."""
    files = [*run.rglob("*.arrow"), *run.glob("*/model/*.safetensors")]
    found: dict[str, object] = {str(path.relative_to(run)): path.read_bytes() for path in files}
    for stage in ("sft", "train"):
        rows = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
        found[f"{stage} losses"] = [(row["loss"], row["grad_norm"]) for row in rows]
    for stage in ("generate", "sft", "rollout", "score"):
        found[f"{stage} manifest"] = (run / stage / "manifest.json").read_bytes()
    return found


def lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "the second shard of generate": lambda run: (run / "generate/rollouts-00001.arrow").exists(),
    "sft's first checkpoint": lambda run: any((run / "sft").glob("checkpoints/.tmp-*")),
    "an odd step of sft": lambda run: lines(run / "sft/metrics.jsonl") >= 3,
    "sft's model": lambda run: any((run / "sft").glob(".tmp-model")) or (run / "sft/model").exists(),
    "a shard of rollout being written": lambda run: any((run / "rollout").glob(".tmp-*-rollouts-*")),
    "score's first shard": lambda run: (run / "score/scores-00000.arrow").exists(),
    "train's second checkpoint": lambda run: (run / "train/checkpoints/step_00000004").exists(),
    "evaluate": lambda run: (run / "evaluate/sft").exists(),
}


@pytest.mark.timeout(600)  # ten starts of the command
def test_kill_9_anywhere_changes_nothing(tmp_path: Path) -> None:
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    write_recipe(undisturbed)
    shutil.copytree(undisturbed, disturbed)
    finish(undisturbed)
    for moment, reached in MOMENTS.items():
        assert interrupt(disturbed, reached, signal.SIGKILL) == -signal.SIGKILL, moment
    finish(disturbed)
    expected, found = outcome(undisturbed / "run"), outcome(disturbed / "run")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert not list((disturbed / "run").rglob(".tmp-*"))


TWO_RANKS = ("parallel.tensor=2", "parallel.processes=2")


@pytest.mark.parametrize("layout", [(), TWO_RANKS], ids=["one process", "two ranks"])
def test_sigterm_saves_a_checkpoint_and_asks_to_be_run_again(tmp_path: Path, layout: tuple[str, ...]) -> None:
    write_recipe(tmp_path)
    assert interrupt(tmp_path, MOMENTS["an odd step of sft"], signal.SIGTERM, "sft.steps=200", *layout) == 75
    log = (tmp_path / "log").read_text()
    assert log.count("run the same command") == 1
    assert "Traceback" not in log
    done = lines(tmp_path / "run/sft/metrics.jsonl")
    assert (tmp_path / f"run/sft/checkpoints/step_{done:08d}/manifest.json").exists()


def test_a_rank_that_is_suspended_ends_the_job_with_its_number_and_it_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(heartbeats.SILENCE, "5")
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    write_recipe(undisturbed, train=None, prompts={"sft": {"task": "arithmetic", "count": 40}})
    shutil.copytree(undisturbed, disturbed)
    layout = ("sft.steps=12", *TWO_RANKS)
    with ExitStack() as stack:
        jobs = {root: start(root, *layout) for root in (undisturbed, disturbed)}
        for job in jobs.values():
            stack.callback(job.kill)
        rank = rank_at_work(jobs[disturbed], disturbed, number=1)
        rank.suspend()
        assert jobs[disturbed].wait(SECONDS) == 1
        log = (disturbed / "log").read_text()
        assert f"lopd: rank 1 (pid {rank.pid} on " in log
        assert "no sign of life for 5s: the job ends" in log
        assert not rank.is_running()
        assert jobs[undisturbed].wait(SECONDS) == 0
    assert start(disturbed, *layout).wait(SECONDS) == 0, (disturbed / "log").read_text()
    model = Path("run/sft/model/model.safetensors")
    assert (disturbed / model).read_bytes() == (undisturbed / model).read_bytes()


def rank_at_work(job: Command, root: Path, number: int) -> psutil.Process:
    """A rank of the launcher `job`, once it has come to the third step."""
    deadline = time.monotonic() + SECONDS
    while lines(root / "run/sft/metrics.jsonl") < 3:
        assert job.poll() is None, (root / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    (rank,) = (
        each for each in psutil.Process(job.pid).children() if each.environ().get("RANK") == str(number)
    )
    return rank


@pytest.mark.nightly
def test_a_suspended_rank_is_woken_to_be_stopped(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    job = start(tmp_path, "sft.steps=5000", *TWO_RANKS)
    with ExitStack() as stack:
        stack.callback(job.kill)
        rank_at_work(job, tmp_path, number=0).suspend()
        job.send_signal(signal.SIGTERM)
        assert job.wait(SECONDS) == 75
    assert "with the checkpoint saved" in (tmp_path / "log").read_text()


def test_kill_9_of_the_launcher_leaves_no_rank_behind(tmp_path: Path) -> None:
    """Started as a user does: nothing of a fork's."""
    write_recipe(tmp_path)
    with (tmp_path / "log").open("ab") as log:
        command = [*COMMAND, "sft.steps=5000", *TWO_RANKS]
        launcher = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
    assert disturb(launcher, tmp_path, MOMENTS["an odd step of sft"], signal.SIGKILL) == -signal.SIGKILL
    time.sleep(0.5)
    ranks = [p for p in psutil.process_iter(["cmdline", "cwd"]) if p.info["cwd"] == str(tmp_path)]
    assert ranks == []


def test_two_runs_do_not_write_into_one_directory(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    first = start(tmp_path, "sft.steps=5000")
    while lines(tmp_path / "run/sft/metrics.jsonl") < 1:
        assert first.poll() is None
        time.sleep(0.01)
    try:
        assert start(tmp_path, "sft.steps=5000").wait(SECONDS) == 1
        assert "run/sft: another lopd is at work here" in (tmp_path / "log").read_text()
    finally:
        first.kill()
