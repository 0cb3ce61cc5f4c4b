"""File systems that are slow, lack a call or fail one: the same artifact, or a line and nothing lost."""

from __future__ import annotations

import errno
import functools
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from megatron_lopd.errors import LopdError
from megatron_lopd.pipeline import workers
from megatron_lopd.runtime import claims
from tests.attacks.attack import Attack, lopd
from tests.attacks.kinds.begun import STAGES, committed
from tests.shims.file_faults import CALLS, Failing, Faults, bearing

ERRNOS = (
    "EACCES EIO ESTALE ENOSPC EDQUOT EROFS EOPNOTSUPP ENOSYS ENOLCK EINVAL EPERM EMFILE EXDEV EAGAIN EINTR"
)
NAMES = (
    "*",
    "*.arrow",
    "*manifest.json",
    "*.claims*",
    "*plan.json",
    "*.lock",
    "*timing.json",
    "*metrics.jsonl",
)


LEASE = 4.0  # seconds


@dataclass(frozen=True)
class Mounted:
    """A stage that was cut off goes on where calls are late by up to `latency` ms, and some fail."""

    stage: str
    afresh: bool  # nothing of it is there yet
    latency: float
    failing: tuple[Failing, ...]


class FileSystems(Attack[Mounted]):
    """Late calls; calls that fail once, thrice or ever, before or after they did their work."""

    name = "file systems"
    copies = ("recipe.yaml", "teacher", "student", "run")
    examples = 2
    seconds = 60.0

    def changes(self) -> SearchStrategy[Mounted]:
        failing = st.builds(
            Failing,
            st.sampled_from(sorted(CALLS)),
            st.sampled_from([getattr(errno, name) for name in ERRNOS.split()]),
            st.sampled_from([*NAMES, "*.tmp*", "*checkpoints*", "*model*", "*tokenizer*"]),
            st.integers(1, 6),
            st.sampled_from([0, 1, 3]),
            st.booleans(),
        ).filter(lambda each: each.count or each.errno != errno.EINTR)  # Python asks again until it ends
        stages = st.sampled_from([each for each in STAGES if each != "report"])
        latency = st.sampled_from([0.0, 0.0, 1.0, 3.0])
        return st.builds(Mounted, stages, st.booleans(), latency, st.lists(failing, max_size=2).map(tuple))

    def spoil(self, world: Path, change: Mounted) -> None:
        directory = world / "run" / change.stage
        for path in directory.rglob("*") if change.afresh else [directory / "manifest.json"]:
            if path.is_file():
                path.unlink()

    def use(self, world: Path, change: Mounted | None) -> str:
        """What the stage makes: under the faults, where it does not refuse; and without them, afterwards."""
        # Of a process that has ended nobody waits for the lease; here one process does both.
        leased = functools.partial(claims.Claims, lease=LEASE, backoff=LEASE / 4)
        workers.Claims = claims.Claims = leased  # type: ignore[misc,assignment]
        if change is not None:
            for command in ("status", change.stage):
                with bearing(Faults(world / "run", change.latency, 0, change.failing)), suppress(LopdError):
                    lopd(command, "recipe.yaml")
        try:
            lopd(*("verify", "run") if change is None else (change.stage, "recipe.yaml"))
        except LopdError as error:
            raise AssertionError(f"refused once nothing fails any more: {error}") from None
        return json.dumps({stage: committed(world, stage) for stage in STAGES})

    def allows(self, change: Mounted, before: str, after: str) -> bool:
        return json.loads(after)[change.stage] == json.loads(before)[change.stage]
