"""The whole pipeline through a real SLURM, and through whatever a cluster does to its jobs.

LOPD_SLURM_MATRIX=1 also disturbs every stage in every way (half an hour).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lopd.artifacts.manifest import load_manifest
from tests.pipeline import write_recipe
from tests.slurm.cluster import Slurm
from tests.slurm.disturbances import CHECKPOINT_EVERY, KINDS, MOMENTS, STEPS, disturb
from tests.slurm.submission import REPOSITORY, STAGES, begin

MIXED = {
    "generate": "kill -9",
    "sft": "scancel USR1",
    "rollout": "scontrol requeue",
    "score": "pre-emption",
    "train": "time limit",
    "evaluate": "scancel TERM",
}
SCHEDULES = {"mixed": MIXED} | (
    {kind: dict.fromkeys(MOMENTS, kind) for kind in KINDS} if "LOPD_SLURM_MATRIX" in os.environ else {}
)


def prepare(root: Path) -> Path:
    root.mkdir()
    training = {"steps": STEPS, "checkpoint_every": CHECKPOINT_EVERY, "global_batch_size": 8}
    training |= {"micro_batch_tokens": 96, "optimizer": {"lr": 1e-3}}
    # a student that drifts is stopped by train.guard
    train = training | {"objective": "sampled_reverse_kl", "optimizer": {"lr": 1e-4}}
    write_recipe(root, sft=training, train=train, parallel={"processes": 2})
    return root


def outcome(run: Path) -> dict[str, object]:
    """Manifest ids, each for every byte of an artifact; of the report, which tells seconds, the parents."""
    found: dict[str, object] = {stage: load_manifest(run / stage).id for stage in STAGES[:-1]}
    return found | {"report": load_manifest(run / "report").parents}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the run is to come to: `lopd run` of the same recipe on this machine, without SLURM."""
    root = prepare(tmp_path_factory.mktemp("undisturbed") / "run")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_lopd.cli", "run", "recipe.yaml"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.timeout(1800)  # some twenty starts of torch; SLURM holds requeued jobs off
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_disturbances_change_nothing(
    schedule: str, undisturbed: Path, slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = prepare(tmp_path / "run")
    run = begin(root, slurm)
    assert list(run.jobs) == list(STAGES)
    for stage, kind in SCHEDULES[schedule].items():
        disturb(run, stage, kind)
        with capsys.disabled():
            print(f"{stage:9} {kind:17} {run.attempts(stage)} attempts")
    run.finish()
    assert (run.directory / "report/summary.json").exists()
    assert outcome(run.directory) == outcome(undisturbed / "run")
