"""What puts a recipe's stages into a queue, by the name that a cluster file calls it."""

from megatron_lopd.launchers.launcher import Job, Launcher, Submission
from megatron_lopd.launchers.slurm import Slurm
from megatron_lopd.registry import LAUNCHERS

__all__ = ["Job", "Launcher", "Slurm", "Submission"]

LAUNCHERS.add(Slurm)
