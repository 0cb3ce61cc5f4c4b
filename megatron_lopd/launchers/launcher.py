"""What a launcher is, and what it is given: the jobs of a run, and where the run is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from megatron_lopd.config import Cluster


@dataclass(frozen=True)
class Job:
    """One thing to queue: `lopd command`, on `nodes` nodes for at most `minutes` an attempt.

    `ranks`: processes a node under torchrun; 0 runs the command itself, once a node. `workers`: so many tasks
    of a node each share the stage; 0 makes it one job over all `nodes`. `gpus`: of each node.
    """

    name: str
    command: str
    nodes: int
    workers: int
    ranks: int
    gpus: int
    minutes: int
    partition: str | None


@dataclass(frozen=True)
class Submission:
    """What all jobs of a run share: absolute paths, and the command line after `lopd <stage>`."""

    launcher: str
    run_dir: Path
    work_dir: Path
    recipe: Path
    overrides: Sequence[str]
    is_from_root: bool = True  # whether the recipe says run_dir from the root

    @property
    def directory(self) -> Path:
        """Where the launcher keeps its scripts and its logs."""
        return self.run_dir / self.launcher

    def arguments(self, job: Job) -> list[str]:
        """Of `python -m megatron_lopd.cli`, to do the job's stage."""
        return [job.command, str(self.recipe), *self.overrides]


class Launcher(ABC):
    """Queues jobs, each behind the one before: a stage may begin once the one before it is committed.

    `name` is what a cluster file calls it, `caption` what it is, in a line. It is made without arguments. A
    job ends with the exit code of its command: 0 done; 75 stopped as asked, or waiting for a refresh, which
    the next job makes; anything else holds up what follows.
    """

    name: ClassVar[str]
    caption: ClassVar[str]

    def check(self, jobs: Sequence[Job], cluster: Cluster, submission: Submission) -> None:  # noqa: B027
        """Raise ConfigError when the jobs could not run on this cluster; the recipe is checked elsewhere."""

    @abstractmethod
    def scripts(self, jobs: Sequence[Job], cluster: Cluster, submission: Submission) -> dict[str, str]:
        """The files that it would write into `submission.directory`, by name: what a dry run prints."""

    @abstractmethod
    def submit(self, jobs: Sequence[Job], cluster: Cluster, submission: Submission) -> list[str]:
        """Put the jobs into the queue, in order; returns lines that say where they are."""
