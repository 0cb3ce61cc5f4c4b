"""A launcher of your own: one shell script that runs stage after stage on this machine.

Name it in a cluster file, and have the folder that it is in on PYTHONPATH:

    launcher: my_launcher:OneScript
    allow_user_code: true
    gpus_per_node: 0
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from megatron_lopd.config import Cluster
from megatron_lopd.errors import ConfigError
from megatron_lopd.launchers import Job, Launcher, Submission

HEAD = """#!/usr/bin/env bash
cd {work_dir}
stage() {{
    "$@"
    local code=$?
    if [ $code -ne 0 ] && [ $code -ne 75 ]; then exit $code; fi  # 75: the next one goes on from there
}}
"""


class OneScript(Launcher):
    """Writes RUN_DIR/one_script/run.sh, for someone to start."""

    name, caption = "one_script", "a shell script that runs stage after stage on this machine"

    def check(self, jobs: Sequence[Job], cluster: Cluster, submission: Submission) -> None:
        if several := [job.name for job in jobs if job.nodes * max(job.workers, 1) > 1]:
            raise ConfigError(f"one_script has one node, and {several[0]} asks for more: set its nodes to 1")

    def scripts(self, jobs: Sequence[Job], cluster: Cluster, submission: Submission) -> dict[str, str]:
        lines = [HEAD.format(work_dir=shlex.quote(str(submission.work_dir))), *cluster.setup]
        for job in jobs:
            python = [sys.executable, "-m"]
            if job.ranks:
                python += ["torch.distributed.run", f"--nproc-per-node={job.ranks}", "-m"]
            command = [*python, "megatron_lopd.cli", *submission.arguments(job)]
            lines.append(f"stage {shlex.join(command)}")
        return {"run.sh": "\n".join(lines) + "\n"}

    def submit(self, jobs: Sequence[Job], cluster: Cluster, submission: Submission) -> list[str]:
        submission.directory.mkdir(parents=True, exist_ok=True)
        for name, text in self.scripts(jobs, cluster, submission).items():
            (submission.directory / name).write_text(text)
        return [f"start it: bash {submission.directory}/run.sh"]
