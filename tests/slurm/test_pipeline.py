"""The whole pipeline through a real SLURM, and through whatever a cluster does to its jobs.

LOPD_SLURM_MATRIX=1 also disturbs every stage in every way (half an hour).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from megatron_lopd.artifacts.manifest import load_manifest
from tests.pipeline import write_recipe
from tests.slurm.cluster import Slurm
from tests.slurm.disturbances import CHECKPOINT_EVERY, KINDS, MOMENTS, STEPS, disturb
from tests.slurm.submission import STAGES, Run, begin

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
    train = training | {"objective": "sampled_reverse_kl"}
    write_recipe(root, sft=training, train=train, parallel={"processes": 2})
    return root


def outcome(run: Run) -> dict[str, object]:
    """Manifest ids, each for every byte of an artifact; of the report, which tells seconds, the parents."""
    found: dict[str, object] = {stage: load_manifest(run.directory / stage).id for stage in STAGES[:-1]}
    return found | {"report": load_manifest(run.directory / "report").parents}


@pytest.fixture(scope="module")
def undisturbed(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing happened to, from submission to its report."""
    run = begin(prepare(tmp_path_factory.mktemp("undisturbed") / "run"), slurm)
    run.finish()
    return run


@pytest.mark.timeout(900)  # nine starts of a Python that imports torch, on two cores
def test_a_submitted_run_ends_in_its_report(undisturbed: Run) -> None:
    assert list(undisturbed.jobs) == list(STAGES)
    assert (undisturbed.directory / "report/summary.json").exists()
    assert [undisturbed.attempts(stage) for stage in STAGES] == [1] * len(STAGES)


@pytest.mark.timeout(1800)  # twice as many starts, and SLURM holds off a job that is queued again
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_disturbances_change_nothing(schedule: str, undisturbed: Run, tmp_path: Path) -> None:
    root = prepare(tmp_path / "run")
    for name in ("teacher", "student"):
        shutil.copytree(undisturbed.root / name, root / name, dirs_exist_ok=True)
    run = begin(root, undisturbed.slurm)
    for stage, kind in SCHEDULES[schedule].items():
        disturb(run, stage, kind)
        print(f"{stage:9} {kind:17} {run.attempts(stage)} attempts")
    run.finish()
    assert outcome(run) == outcome(undisturbed)
