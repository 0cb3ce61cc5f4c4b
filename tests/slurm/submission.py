"""A tiny run, submitted with the launcher to the tests' SLURM, and ways to disturb it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from tests.slurm.cluster import Slurm

REPOSITORY = Path(__file__).parents[2]
STAGES = ("generate", "sft", "rollout", "score", "train", "export", "evaluate", "report")
# A rank of training on each (write_recipe's parallel.processes is to be 2), or a worker.
NODES = {"generate": 2, "sft": 2, "rollout": 2, "score": 2, "train": 2}
SIGNAL_SECONDS = 50  # of a limit of a minute, the shortest there is: the signal comes soon after the start
MINUTES = 30
SECONDS = 240.0  # for a stage to end: a start imports torch and Megatron-Core, on two cores others use too


def write_cluster(root: Path, **keys: object) -> Path:
    """A cluster file for the tests' SLURM: no GPUs, the Python that runs the tests."""
    cluster = {
        "gpus_per_node": 0,
        "stages": {stage: {"minutes": MINUTES, "nodes": NODES.get(stage, 1)} for stage in STAGES},
        "setup": [f"export PATH={Path(sys.executable).parent}:$PATH"],
        "env": [f"PYTHONPATH={REPOSITORY}", "OMP_NUM_THREADS=1"],
        "signal_seconds": SIGNAL_SECONDS,
    }
    path = root / "cluster.yaml"
    path.write_text(yaml.safe_dump(cluster | keys))
    return path


def submit(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`launcher/submit.py recipe.yaml cluster.yaml`, run in `root`."""
    command = [sys.executable, str(REPOSITORY / "launcher/submit.py"), "recipe.yaml", "cluster.yaml"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [*command, *arguments], cwd=root, env=environment, capture_output=True, text=True, timeout=SECONDS
    )


@dataclass
class Run:
    """A run in the queue: `jobs` are the job ids by name."""

    root: Path
    slurm: Slurm
    jobs: dict[str, str]

    @property
    def directory(self) -> Path:
        return self.root / "run"

    def wait_for(self, what: str, reached: Callable[[], bool]) -> None:
        """As Slurm.wait_for; the logs are part of what a failure shows."""
        try:
            self.slurm.wait_for(what, reached, SECONDS)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    def finish(self, *names: str) -> None:
        """Wait until the named jobs, or all, are completed. AssertionError when one fails."""
        for name in names or self.jobs:
            self.wait_for(f"{name} to end", lambda name=name: self._ended(name))

    def logs(self, job: str = "") -> str:
        """What the attempts at a job, or at all, wrote."""
        paths = sorted((self.directory / "slurm/logs").glob(f"{job}*-attempt*.log"))
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')}" for path in paths)

    def attempts(self, job: str) -> int:
        return len(list((self.directory / "slurm/logs").glob(f"{job}-{self.jobs[job]}*-attempt*.log")))

    def ranks(self, job: str) -> list[psutil.Process]:
        """The processes of a job's step that do its work."""
        found = []
        for process in psutil.process_iter(["cmdline", "cwd"]):
            words = process.info["cmdline"] or []
            ours = process.info["cwd"] == str(self.root) and "megatron_lopd.cli" in words
            if ours and job in words and "torch.distributed.run" not in words:
                found.append(process)
        return found

    def _ended(self, name: str) -> bool:
        state = self.slurm.state(self.jobs[name])
        assert state not in ("FAILED", "TIMEOUT", "CANCELLED"), f"{name} is {state}\n{self.logs(name)}"
        return state == "COMPLETED"


def begin(root: Path, slurm: Slurm, **keys: object) -> Run:
    """Submit the recipe in `root`; `keys` are of the cluster file. AssertionError when that fails."""
    write_cluster(root, **keys)
    done = submit(root)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if " job " in line]
    return Run(root, slurm, {words[0]: words[2].rstrip(":") for words in lines})
