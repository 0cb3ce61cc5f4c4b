"""A job's batch script. What it does is in lib.sh; the script holds what differs between jobs."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from megatron_lopd.config import Cluster
from megatron_lopd.launchers.launcher import Job, Submission


def comment_of(submission: Submission) -> str:
    """Marks the jobs of a run in the queue."""
    return f"lopd {submission.run_dir}"


def render(job: Job, submission: Submission, cluster: Cluster) -> str:
    """The text of the script. It is also what every task runs, with the argument `task`."""
    where = cluster.container.workdir if cluster.container else None
    arguments = submission.arguments(job)
    lines = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH {option}" for option in _options(job, submission, cluster)),
        "",
        f"stage={shlex.quote(job.name)}",
        f"directory={shlex.quote(str(submission.directory))}",
        f"work_dir={shlex.quote(where or str(submission.work_dir))}",
        f"ranks={job.ranks}  # processes a node under torchrun; 0: the command itself",
        f"max_requeues={cluster.max_requeues}",
        f"arguments=({shlex.join(arguments)})",
        f"srun_options=({shlex.join(_container(cluster, where or str(submission.work_dir)))})",
        "setup() {",
        *(f"    export {each}" for each in _environment(cluster)),
        *(f"    {line}" for line in cluster.setup),
        "    :",
        "}",
        "",
        'if ! source "$directory/lib.sh"; then  # there is no log yet: the queue carries the message',
        '    scontrol update JobId="$SLURM_JOB_ID" Comment="$(hostname) does not see $directory: '
        'put run_dir on a shared directory"',
        "    exit 1",
        "fi",
        'main "$@"',
    ]
    return "\n".join(lines) + "\n"


def _options(job: Job, submission: Submission, cluster: Cluster) -> Iterator[str]:
    yield f"--job-name=lopd-{job.name}"
    yield f"--comment={shlex.quote(comment_of(submission))}"
    yield "--output=/dev/null"  # the script opens a log of its own for each attempt
    if job.workers:
        yield f"--array=0-{job.workers - 1}"
    yield f"--nodes={job.nodes}"
    yield "--ntasks-per-node=1"
    if job.gpus:
        yield f"--gpus-per-node={job.gpus}"
    yield f"--cpus-per-task={cluster.cpus_per_node}"
    if cluster.memory is not None:
        yield f"--mem={cluster.memory}"
    yield f"--time={job.minutes}"
    for name, value in (("partition", job.partition), ("account", cluster.account), ("qos", cluster.qos)):
        if value is not None:
            yield f"--{name}={value}"
    yield "--requeue"
    yield f"--signal=B:USR1@{cluster.signal_seconds}"
    yield "--kill-on-invalid-dep=no"  # what waits for a failed stage stays in the queue, held
    yield from cluster.sbatch


def _container(cluster: Cluster, work_dir: str) -> Iterator[str]:
    container = cluster.container
    if container is None:
        return
    yield f"--container-image={container.image}"
    if container.mounts:
        yield f"--container-mounts={','.join(container.mounts)}"
    yield f"--container-workdir={work_dir}"
    if container.writable:
        yield "--container-writable"


def _environment(cluster: Cluster) -> Iterator[str]:
    for text in cluster.env:
        name, equals, value = text.partition("=")
        if equals:
            yield f"{name}={shlex.quote(value)}"
        else:  # sbatch hands on the environment that it is started in
            yield f'{name}="${{{name}?did not come along: let sbatch hand on the environment (--export)}}"'
