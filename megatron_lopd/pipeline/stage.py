"""What a stage is: one class each, in stages/, which says what it would do and from what, and does it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_lopd.artifacts.manifest import LineageStatus, Parent, plan_digest

if TYPE_CHECKING:
    from megatron_lopd.pipeline.resolved import ResolvedRun


@dataclass(frozen=True)
class Plan:
    """What a stage is about to make, and from what: enough to know whether it is already made."""

    config: dict[str, Any]
    parents: dict[str, Parent]
    lineage: LineageStatus


def identity_of(plan: Plan) -> str:
    """A digest of all that decides what comes out: shards and checkpoints carry it."""
    return plan_digest(plan.config, plan.parents)


@dataclass(frozen=True)
class Output:
    """The files a stage made (relative to its directory), what it counted, what it ran on."""

    files: list[str]
    counts: dict[str, int]
    versions: dict[str, str] = field(default_factory=dict)


class Stage(ABC):
    """A step from committed artifacts to a committed artifact. `name` is also its directory.

    Its module is imported by commands that only ask: torch, numpy and the like are imported inside the
    methods that use them.
    """

    name: str
    kind: str

    @abstractmethod
    def check(self, run: ResolvedRun) -> list[str]:
        """What would be done, a line each. Raises, before anything is spent, where the recipe is wrong."""

    @abstractmethod
    def plan(self, run: ResolvedRun) -> Plan:
        """What it will read, its lineage proved. LineageError where that does not hold."""

    @abstractmethod
    def commit(self, run: ResolvedRun, plan: Plan) -> Output:
        """Do the work, in the process that writes the manifest; says which files belong to the artifact."""

    def follow(self, run: ResolvedRun, plan: Plan) -> None:  # noqa: B027 - most have no ranks
        """What ranks above 0 do while rank 0 does `commit`, or `share`."""

    def complete(self, run: ResolvedRun, plan: Plan) -> Plan:
        """`plan` with what the stage was made from that was not there when it began."""
        return plan

    def needed(self, run: ResolvedRun) -> bool:
        """Whether the recipe asks for this stage."""
        return True

    def processes(self, run: ResolvedRun) -> int:
        """How many ranks `lopd run` starts for it."""
        return 1

    def on_gpu(self, run: ResolvedRun) -> bool:
        """Whether it uses a GPU, where there is one; `lopd run` then has another process do it."""
        return True


class SharedStage(Stage):
    """A stage that several processes may make at once."""

    @abstractmethod
    def share(self, run: ResolvedRun, plan: Plan) -> None:
        """Return once all that they make together is there; `commit`, in one of them, makes the rest."""

    @abstractmethod
    def workers(self, run: ResolvedRun) -> int:
        """How many processes share it on this machine."""
