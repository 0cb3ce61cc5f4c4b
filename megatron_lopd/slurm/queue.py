"""What is wrong is found before the queue; then the jobs go into it, each behind the one before."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from megatron_lopd.commands.run import check_run_dir
from megatron_lopd.config import Cluster, Recipe
from megatron_lopd.errors import ConfigError, EngineError, LopdError, NotInstalled
from megatron_lopd.pipeline.resolved import ResolvedRun
from megatron_lopd.slurm.jobs import Job
from megatron_lopd.slurm.script import Submission, render
from megatron_lopd.stages.table import STAGES


def check(jobs: Sequence[Job], recipe: Recipe, cluster: Cluster, submission: Submission) -> list[str]:
    """Raise ConfigError, DataError or LopdError when the jobs could not run. Returns what was not checked."""
    for program in ("sbatch", "srun", "squeue", "sinfo"):
        if shutil.which(program) is None:
            raise ConfigError(
                f"{program} is not on PATH: there is no SLURM here: submit on a login node of a cluster, or "
                "run on this machine with lopd run"
            )
    if queued := _queued(submission):
        raise LopdError(
            f"{submission.run_dir}: jobs of this run are in the queue: wait for them, or remove them with "
            f"scancel {' '.join(queued)}"
        )
    for job in jobs:
        _check_partition(job, cluster)
    _check_image(cluster)
    return _check_recipe(jobs, recipe)


def submit(jobs: Sequence[Job], cluster: Cluster, submission: Submission, library: Path) -> list[str]:
    """Put the jobs into the queue, in order; returns a line for each, and how to watch them.

    Every script is tried with `sbatch --test-only` first. ConfigError with sbatch's words if it refuses one.
    """
    logs = submission.directory / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, submission.directory / "lib.sh")
    except OSError as error:
        raise ConfigError(f"run_dir: {submission.directory} cannot be written: {error.strerror}") from None
    paths = []
    for job in jobs:
        path = submission.directory / f"{job.name}.sbatch"
        path.write_text(render(job, submission, cluster))
        _sbatch(job, "--test-only", str(path))
        paths.append(path)
    lines, before = [], ""
    for job, path in zip(jobs, paths, strict=True):
        after = (f"--dependency=afterok:{before}",) if before else ()
        before = _sbatch(job, "--parsable", *after, str(path)).partition(";")[0]
        lines.append(f"{job.name:12} job {before}: {logs}/{job.name}-{before}*-attempt*.log")
    return [*lines, "watch: squeue --me --format='%i %j %T %R'"]


def _queued(submission: Submission) -> list[str]:
    """Ids of the jobs in the queue that were submitted for the same run_dir."""
    listed = _ask("squeue", "--me", "--noheader", "--array-unique", "--format=%A|%k").splitlines()
    entries = (line.partition("|") for line in listed)
    return sorted(
        {number for number, _, comment in entries if comment.strip() == submission.comment}, key=int
    )


def _check_partition(job: Job, cluster: Cluster) -> None:
    """The partition is there, and its nodes have the GPUs, and are as many as, the job asks for."""
    which = ("--partition", job.partition) if job.partition else ()
    nodes = [line.split() for line in _ask("sinfo", "--noheader", "--format=%P %D %G", *which).splitlines()]
    if not job.partition:
        nodes = [entry for entry in nodes if entry[0].endswith("*")]
    if not nodes:
        known = ", ".join(sorted(set(_ask("sinfo", "--noheader", "--format=%R").split())))
        raise ConfigError(f"{job.name}: partition {job.partition} is not there: this cluster has {known}")
    most = max(_gpus(entry[2]) for entry in nodes)
    if job.gpus > most:
        raise ConfigError(
            f"{job.name}: gpus_per_node={job.gpus}, and the nodes of partition "
            f"{nodes[0][0].rstrip('*')} have {most}: set gpus_per_node to that, or name another partition"
        )
    count = sum(int(entry[1]) for entry in nodes)
    if job.nodes > count:
        raise ConfigError(
            f"{job.name}: stages.{job.command}.nodes={job.nodes}, and partition {nodes[0][0].rstrip('*')} "
            f"has {count}: ask for fewer"
        )


def _gpus(gres: str) -> int:
    """GPUs in sinfo's generic resources: `gpu:8(S:0-1)`, `gpu:h100:4,nvme:1`, `(null)`."""
    return sum(int(count) for count in re.findall(r"\bgpu(?::[A-Za-z][^:,(]*)?:(\d+)", gres))


def _check_image(cluster: Cluster) -> None:
    """An image that is a file must be there; a registry's can be looked up only by pulling it."""
    container = cluster.container
    if container and container.image.startswith(("/", ".")) and not Path(container.image).is_file():
        raise ConfigError(
            f"container.image: {container.image} is not there: make it with enroot import, or give its path"
        )


def _check_recipe(jobs: Sequence[Job], recipe: Recipe) -> list[str]:
    """Each stage's own check, but for what a login node, outside any container, cannot have."""
    run = ResolvedRun(dataclasses.replace(recipe, fp8=None))
    check_run_dir(run)
    commands, unchecked = {job.command for job in jobs}, []
    for stage in STAGES:
        if stage.name in commands:
            try:
                stage.check(run)
            except (EngineError, NotInstalled) as error:
                unchecked.append(f"{stage.name}: not checked here, the nodes will: {error}")
    return unchecked


def _sbatch(job: Job, *arguments: str) -> str:
    try:
        return _ask("sbatch", *arguments)
    except LopdError as error:
        raise ConfigError(f"{job.name}: SLURM refuses the job: {error}") from None


def _ask(*command: str) -> str:
    """What a SLURM command prints. LopdError with its last words when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise LopdError(words[-1] if words else f"{command[0]} ended with exit code {done.returncode}")
    return done.stdout.strip()
