"""What is refused before the queue, and what a job that fails, crashes or is cancelled leaves behind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline import write_recipe
from tests.slurm.cluster import Slurm
from tests.slurm.submission import MINUTES, Run, begin, submit, write_cluster

# Of generate, so that its attempts are those of one task.
ONE_TASK = {"generate": {"minutes": MINUTES}, "sft": {"minutes": MINUTES, "nodes": 2}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_recipe(tmp_path, parallel={"processes": 2})
    return tmp_path


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"partition": "nowhere"}, "partition nowhere is not there: this cluster has batch, urgent"),
        (
            {"gpus_per_node": 8, "cpus_per_node": 8},
            "and the nodes of partition batch have 0",
        ),
        ({"stages": {"sft": {"nodes": 3}}}, "stages.sft.nodes=3 does not divide parallel.processes=2"),
        ({"memory": "900T"}, "SLURM refuses the job"),
        (
            {"container": {"image": "/nowhere/image.sqsh", "mounts": ["/:/"]}},
            "image.sqsh is not there",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_before_the_queue(keys: dict[str, Any], message: str, slurm: Slurm, root: Path) -> None:
    write_cluster(root, **keys)
    done = submit(root)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert not slurm.ask("squeue", "--noheader", f"--name={','.join(['lopd-generate', 'lopd-sft'])}")


def test_a_recipe_that_names_a_missing_model(slurm: Slurm, root: Path) -> None:
    write_cluster(root)
    done = submit(root, "teacher.model=nowhere")
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1
    assert "nowhere" in done.stderr


def test_no_slurm(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cluster(root)
    monkeypatch.setenv("PATH", str(root))
    done = submit(root)
    assert done.returncode == 2
    assert "there is no SLURM here" in done.stderr


def test_a_failed_stage_holds_what_follows_and_a_second_submission(slurm: Slurm, root: Path) -> None:
    run = begin(root, slurm, setup=["exit 2"], stages=ONE_TASK)
    run.wait_for("generate to fail", lambda: slurm.state(run.jobs["generate"]) == "FAILED")
    last = run.logs("generate").splitlines()[-1]
    assert "generate failed with exit code 2: read" in last
    assert f"generate-{run.jobs['generate']}_0-attempt0.log" in last
    run.wait_for("sft to be held", lambda: "DependencyNeverSatisfied" in reason(run, "sft"))
    done = submit(root)
    assert done.returncode == 1
    assert f"scancel {run.jobs['sft']} {run.jobs['rollout']}" in done.stderr
    cancel(run)


def test_a_node_that_does_not_see_the_run(slurm: Slurm, root: Path) -> None:
    run = begin(root, slurm, sbatch=["--hold"])
    shutil.rmtree(run.directory)
    job = run.jobs["generate"]
    slurm.ask("scontrol", "release", job)
    run.wait_for("generate to fail", lambda: slurm.state(job) == "FAILED")
    comment = slurm.ask("scontrol", "show", "job", job)
    assert f"does not see {run.directory / 'slurm'}: put run_dir on a shared directory" in comment
    cancel(run)


def test_a_crash_is_tried_again_at_most_so_often(slurm: Slurm, root: Path) -> None:
    run = begin(root, slurm, setup=["kill -9 $$"], max_requeues=1, stages=ONE_TASK)
    run.wait_for("generate to fail", lambda: slurm.state(run.jobs["generate"]) == "FAILED")
    assert run.attempts("generate") == 2
    assert "was killed or crashed (exit code 137) after max_requeues=1" in run.logs("generate")
    cancel(run)


def test_a_cancelled_job_stays_cancelled(slurm: Slurm, root: Path) -> None:
    run = begin(root, slurm, setup=["sleep 1000"])
    job = run.jobs["generate"]
    run.wait_for("generate to run", lambda: "attempt 0" in run.logs("generate"))
    slurm.ask("scancel", job)
    run.wait_for("generate to end", lambda: "CANCELLED" in slurm.state(job))
    run.wait_for("the node to be free", lambda: not slurm.ask("squeue", "--noheader", "--states=CG,R"))
    assert slurm.state(job) == "CANCELLED"
    cancel(run)


def reason(run: Run, job: str) -> str:
    return run.slurm.ask("squeue", "--noheader", f"--jobs={run.jobs[job]}", "--format=%r")


def cancel(run: Run) -> None:
    run.slurm.ask("scancel", *run.jobs.values())
