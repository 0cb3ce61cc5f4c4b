"""SLURM: what is wrong is found before the queue; then the jobs go into it, each behind the one before."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from megatron_lopd.config import Cluster
from megatron_lopd.errors import ConfigError, LopdError
from megatron_lopd.files.writing import atomic_write_text, copy_file
from megatron_lopd.launchers.launcher import Job, Launcher, Submission
from megatron_lopd.launchers.slurm_script import comment_of, render

LIBRARY = Path(__file__).with_name("lib.sh")


class Slurm(Launcher):
    """One sbatch a job, or an array of workers; what a job does is in lib.sh."""

    name, caption = "slurm", "SLURM: sbatch, a script a stage"

    def check(self, jobs: Sequence[Job], cluster: Cluster, submission: Submission) -> None:
        for program in ("sbatch", "srun", "squeue", "sinfo"):
            if shutil.which(program) is None:
                raise ConfigError(
                    f"{program} is not on PATH: there is no SLURM here: submit on a login node of a cluster, "
                    "or run on this machine with lopd run"
                )
        if queued := _queued(submission):
            raise LopdError(
                f"{submission.run_dir}: jobs of this run are in the queue: wait for them, or remove them "
                f"with scancel {' '.join(queued)}"
            )
        for job in jobs:
            _check_partition(job, cluster)
        _check_image(cluster)

    def scripts(self, jobs: Sequence[Job], cluster: Cluster, submission: Submission) -> dict[str, str]:
        return {f"{job.name}.sbatch": render(job, submission, cluster) for job in jobs}

    def submit(self, jobs: Sequence[Job], cluster: Cluster, submission: Submission) -> list[str]:
        """Every script is tried with `sbatch --test-only` first. ConfigError with its words if it refuses."""
        logs = submission.directory / "logs"
        try:
            logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"run_dir: {submission.directory} cannot be written: {error.strerror}"
            ) from None
        copy_file(LIBRARY, submission.directory / "lib.sh")
        paths = []
        for job, (name, text) in zip(jobs, self.scripts(jobs, cluster, submission).items(), strict=True):
            path = submission.directory / name
            atomic_write_text(path, text, permissions=0o600)  # of cluster.env, with what is secret in it
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
        {number for number, _, comment in entries if comment.strip() == comment_of(submission)}, key=int
    )


def _check_partition(job: Job, cluster: Cluster) -> None:
    """The partition is there; its nodes have the GPUs and cores, and are as many as, the job asks for."""
    which = ("--partition", job.partition) if job.partition else ()
    nodes = [
        line.split() for line in _ask("sinfo", "--noheader", "--format=%P %D %G %c", *which).splitlines()
    ]
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
    cores = max(int(entry[3].rstrip("+")) for entry in nodes)
    if cluster.cpus_per_node > cores:
        raise ConfigError(
            f"{job.name}: cpus_per_node={cluster.cpus_per_node}, and the nodes of partition "
            f"{nodes[0][0].rstrip('*')} have {cores}: set cpus_per_node to that, or name another partition"
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


def _sbatch(job: Job, *arguments: str) -> str:
    try:
        return _ask("sbatch", *arguments)
    except LopdError as error:
        raise ConfigError(f"{job.name}: SLURM refuses the job: {error}") from None


def _ask(*command: str) -> str:
    """What a SLURM command prints. LopdError with its last words when it fails."""
    # Bytes as names have them: a run's directory, which need not be UTF-8, is in its jobs' comments.
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="surrogateescape", check=False
    )
    if done.returncode:
        words = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise LopdError(words[-1] if words else f"{command[0]} ended with exit code {done.returncode}")
    return done.stdout.strip()
