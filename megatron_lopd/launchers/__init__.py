"""What queues jobs on a cluster, by name."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lopd.registry import LAUNCHERS


@dataclass(frozen=True)
class LauncherKind:
    name: str
    caption: str


LAUNCHERS.add(LauncherKind("slurm", "sbatch, a script a stage"))
