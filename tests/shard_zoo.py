"""Shards that a test writes, committed as a stage's artifact, which alone is read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_lopd.artifacts.manifest import MANIFEST, commit, plan_digest
from megatron_lopd.data.shard_kind import ShardKind
from megatron_lopd.data.shards import write_shard

PLAN = plan_digest({}, {})


def commit_shards(directory: Path) -> None:
    """Have a manifest list the shards that are in `directory` now."""
    (directory / MANIFEST).unlink(missing_ok=True)
    files = [path.name for path in directory.glob("*.arrow")]
    commit(
        directory, "rollouts", files=files, config={}, counts={}, versions={}, parents={}, lineage="proved"
    )


def write_committed(directory: Path, name: str, kind: ShardKind[Any], records: Iterable[Any]) -> None:
    """Write a shard of an artifact, and commit that anew with all its shards."""
    write_shard(directory / name, kind, records, PLAN)
    commit_shards(directory)
