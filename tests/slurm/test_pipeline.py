"""The whole pipeline through a real SLURM, and through whatever a cluster does to its jobs.

Of its first stages, and every night of all, each disturbed in a way of its own. LOPD_SLURM_MATRIX=1 also
disturbs every stage in every way (half an hour).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from megatron_lopd.artifacts.manifest import load_manifest
from tests.forks import Command
from tests.pipeline import write_recipe
from tests.slurm.cluster import Slurm
from tests.slurm.disturbances import CHECKPOINT_EVERY, KINDS, MOMENTS, STEPS, disturb
from tests.slurm.submission import SECONDS, STAGES, begin

# By stage, how it is disturbed. One of each kind of job: workers of an array, and ranks over two nodes.
SHORT = {"generate": "kill -9", "sft": "scontrol requeue"}
MIXED = {
    "generate": "kill -9",
    "sft": "scancel USR1",
    "rollout": "scontrol requeue",
    "score": "pre-emption",
    "train": "time limit",
    "evaluate": "scancel TERM",
}
SCHEDULES = {"short": SHORT, "mixed": MIXED} | (
    {kind: dict.fromkeys(MOMENTS, kind) for kind in KINDS} if "LOPD_SLURM_MATRIX" in os.environ else {}
)


def prepare(root: Path, schedule: str) -> Path:
    """The recipe, in `root`: of all stages, but for the short schedule, which has those that it disturbs."""
    root.mkdir()
    training = {"steps": STEPS, "checkpoint_every": CHECKPOINT_EVERY, "global_batch_size": 8}
    training |= {"micro_batch_tokens": 96, "optimizer": {"lr": 1e-3}}
    # a student that drifts is stopped by train.guard
    train = training | {"objective": "sampled_reverse_kl", "optimizer": {"lr": 1e-4}}
    sections: dict[str, Any] = {"sft": training, "train": train, "parallel": {"processes": 2}}
    if schedule == "short":
        sections |= {"train": None, "prompts": {"sft": {"task": "arithmetic", "count": 40}}}
    write_recipe(root, **sections)
    return root


def outcome(run: Path) -> dict[str, object]:
    """Manifest ids, each for every byte of an artifact; of the report, which tells seconds, the parents."""
    manifests = {stage: load_manifest(run / stage) for stage in STAGES if (run / stage).exists()}
    return {name: each.parents if name == "report" else each.id for name, each in manifests.items()}


@pytest.mark.timeout(1800)  # up to twenty starts of torch; SLURM holds requeued jobs off
@pytest.mark.parametrize(
    "schedule",
    [name if name == "short" else pytest.param(name, marks=pytest.mark.nightly) for name in SCHEDULES],
)
def test_disturbances_change_nothing(
    schedule: str, slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It comes to what `lopd run` of the same recipe makes on this machine, without SLURM."""
    undisturbed = prepare(tmp_path / "undisturbed", schedule)
    assert Command(undisturbed, ["run", "recipe.yaml"]).wait(SECONDS) == 0, (undisturbed / "log").read_text()
    run = begin(prepare(tmp_path / "run", schedule), slurm)
    assert list(run.jobs) == [stage for stage in STAGES if schedule != "short" or stage in SHORT]
    for stage, kind in SCHEDULES[schedule].items():
        disturb(run, stage, kind)
        with capsys.disabled():
            print(f"{stage:9} {kind:17} {run.attempts(stage)} attempts")
    run.finish()
    expected = outcome(undisturbed / "run")
    assert expected.keys() == run.jobs.keys()
    assert outcome(run.directory) == expected
