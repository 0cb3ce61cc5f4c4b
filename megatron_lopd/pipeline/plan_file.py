"""The plan that a stage was begun with, kept in its directory, and the refusal to go on with another."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_lopd.artifacts.lineage import short
from megatron_lopd.artifacts.manifest import VERSION, Parent, is_committed, problem_of
from megatron_lopd.errors import DataError, LineageError
from megatron_lopd.files.reading import is_there, read_object
from megatron_lopd.files.writing import TEMPORARY_PREFIX, atomic_write_json, publish
from megatron_lopd.pipeline.stage import Plan
from megatron_lopd.runtime.claim_files import remove_claims

PLAN_FILE = "plan.json"


def begin(stage: str, directory: Path, plan: Plan, *, alone: bool) -> None:
    """Note what is being made, or check that what was begun here before is the same thing.

    What was begun without a part of it being made binds nobody: where this process is `alone` in the
    directory, that is forgotten. Others may have committed since it was looked at, and gone.
    """
    if alone and not is_committed(directory) and not has_parts(directory):
        remove_claims(directory)
        (directory / PLAN_FILE).unlink(missing_ok=True)
    if begun_plan(directory) is None:
        parents_plain = {role: vars(parent) for role, parent in plan.parents.items()}
        private = directory / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        # The version is of the digests in it, too.
        plain = {"version": VERSION, "config": plan.config, "parents": parents_plain}
        atomic_write_json(private, plain)
        publish(private, directory / PLAN_FILE)  # of two workers that begin, the first
    begun = begun_plan(directory)
    if begun is not None:
        refuse_change(stage, directory, begun.config, begun.parents, plan)


def has_parts(directory: Path) -> bool:
    """Whether anything is there that a later attempt would go on from: a shard, or a whole checkpoint."""
    shards = (name for _, _, names in os.walk(directory) for name in names if name.endswith(".arrow"))
    return any(shards) or any(is_committed(path) for path in (directory / "checkpoints").glob("*"))


def begun_plan(directory: Path) -> Plan | None:
    """What a stage was begun with, but for its lineage; None when it was not.

    DataError when it is damaged, or another release began.
    """
    path = directory / PLAN_FILE
    if not is_there(path):
        return None
    begun = read_object(path, follow_links=False)
    if begun.get("version") != VERSION:
        raise DataError(
            f"{path}: not of version {VERSION}, which this program reads: go on with the version of "
            f"megatron-lopd that began it, or remove {directory} to make it again"
        )
    try:
        parents = {role: Parent(**parent) for role, parent in begun["parents"].items()}
        problem = problem_of(begun["config"], parents)
    except (TypeError, KeyError, AttributeError) as error:
        problem = str(error)
    if problem:
        raise DataError(f"{path}: damaged: {problem}: remove {directory} to make it again")
    return Plan(begun["config"], parents, "proved")


def refuse_change(
    stage: str, directory: Path, config: Mapping[str, Any], parents: Mapping[str, Parent], plan: Plan
) -> None:
    """LineageError, naming what changed, unless `config` and `parents`, as recorded, are those of `plan`."""
    remedy = f"undo that, or remove {directory} and what follows to make it again, or set another run_dir"
    for role in sorted(parents.keys() | plan.parents.keys()):
        before, now = parents.get(role), plan.parents.get(role)
        if before is None or now is None:
            raise LineageError(
                f"refused: {directory} was made {'without' if before is None else 'with'} {role}: {remedy}"
            )
        for part in sorted(before.digests.keys() | now.digests.keys()):
            was, is_now = before.digests.get(part, "none"), now.digests.get(part, "none")
            if was != is_now:
                is_renamed = before.path != now.path
                what = "is not what it was made with" if is_renamed else "changed after it was made"
                raise LineageError(
                    f"refused: the {role} of {stage} {what}: {part} was {short(was)} "
                    f"({before.path}), is now {short(is_now)} ({now.path}): {remedy}"
                )
    for name, was, is_now in _differences(config, plan.config):
        raise LineageError(
            f"refused: {directory} was made with {name}={was!r}, the recipe now says {is_now!r}: {remedy}"
        )


def _differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for name in sorted(old.keys() | new.keys()):
            found += _differences(old.get(name), new.get(name), f"{prefix}.{name}" if prefix else name)
        return found
    return [] if old == new else [(prefix, old, new)]
