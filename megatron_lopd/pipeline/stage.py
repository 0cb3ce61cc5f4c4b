"""How every stage runs: plan, skip if committed, run or resume, commit.

A stage is made from functions, not by inheritance: `check` looks at the recipe alone (so that a
wrong setting is found before anything is spent), `plan` looks at what it will read and proves its
lineage, `run` does the work in the stage's directory and says which files to commit.
"""

from __future__ import annotations

import fcntl
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import megatron_lopd
from megatron_lopd.artifacts.files import (
    TEMPORARY_PREFIX,
    atomic_write_json,
    canonical_json,
    publish,
    read_json,
    sha256_bytes,
)
from megatron_lopd.artifacts.lineage import short
from megatron_lopd.artifacts.manifest import (
    MANIFEST,
    LineageStatus,
    Manifest,
    Parent,
    clear_temporaries,
    commit,
    is_committed,
    load_manifest,
    verify_files,
)
from megatron_lopd.config import Recipe
from megatron_lopd.errors import ConfigError, DataError, LineageError, LopdError, StopRequested
from megatron_lopd.runtime.claims import make_once, remove_claims
from megatron_lopd.runtime.signals import stopping_at_once

PLAN_FILE = "plan.json"
TIMING_FILE = "timing.json"
LOCK_FILE = ".lock"


@dataclass(frozen=True)
class Plan:
    """What a stage is about to make, and from what: enough to know whether it is already made."""

    config: dict[str, Any]
    parents: dict[str, Parent]
    lineage: LineageStatus


OTHER_RANK = Plan({}, {}, "proved")


def identity_of(plan: Plan) -> str:
    """A digest of all that decides a training job's numbers; its checkpoints carry it."""
    parents = {role: parent.digests for role, parent in plan.parents.items()}
    return sha256_bytes(canonical_json([plan.config, parents]))


@dataclass(frozen=True)
class Output:
    """The files a stage made (relative to its directory), what it counted, what it ran on."""

    files: list[str]
    counts: dict[str, int]
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """A step from committed artifacts to a committed artifact. `name` is also its directory.

    `check(recipe)` returns what would be done, a line each. `processes(recipe)` is how many ranks
    `lopd run` starts for it. Every rank enters; rank 0 alone plans, proves and commits, and `run` in the
    others is given `OTHER_RANK` as their plan. What is about to be read they hash together, a share each.
    `on_gpu(recipe)`: whether it uses a GPU, where there is one; `lopd run` then has another process do it.
    `complete(recipe, plan)` adds what a stage was made from that came only while it was at work.
    A stage with `share` may be made by several processes at once: `share(recipe, plan, directory)` returns
    once all that they make together is there, and `run` then makes the rest in one of them; `workers(recipe)`
    is how many processes share it on this machine.
    """

    name: str
    kind: str
    check: Callable[[Recipe], list[str]]
    plan: Callable[[Recipe], Plan]
    run: Callable[[Recipe, Plan, Path], Output]
    processes: Callable[[Recipe], int] = lambda recipe: 1
    on_gpu: Callable[[Recipe], bool] = lambda recipe: True
    needed: Callable[[Recipe], bool] = lambda recipe: True
    complete: Callable[[Recipe, Plan], Plan] = lambda recipe, plan: plan
    share: Callable[[Recipe, Plan, Path], None] | None = None
    workers: Callable[[Recipe], int] = lambda recipe: 1


def directory_of(recipe: Recipe, stage: str) -> Path:
    """Where a stage's artifact is."""
    return Path(recipe.run_dir) / stage


def parent_manifest(recipe: Recipe, stage: str) -> Manifest:
    """The committed manifest of an earlier stage. DataError when that stage has not run."""
    return load_manifest(directory_of(recipe, stage))


def execute(stage: Stage, recipe: Recipe) -> bool:
    """Run `stage` unless it is committed. Returns whether anything was done.

    Raises LineageError when what is committed, or was begun, is not what the recipe now asks for.
    """
    directory = directory_of(recipe, stage.name)
    committed = is_committed(directory)
    if not is_main_rank():
        if not committed:
            if stage.share is None:
                _verify_parents_together(recipe, OTHER_RANK)
            stage.run(recipe, OTHER_RANK, directory)
        return not committed
    if committed:
        check_unchanged(stage, recipe)
        return False
    plan = stage.plan(recipe)
    if stage.share is not None:
        _execute_shared(stage, stage.share, recipe, plan)
        return True
    with _sole_worker(directory):
        clear_temporaries(directory)
        _begin(stage, directory, plan)
        _verify_parents_together(recipe, plan)
        _make(stage, recipe, plan, time.monotonic())
    return True


def _make(stage: Stage, recipe: Recipe, plan: Plan, started: float) -> None:
    """Run the stage and commit what it made. `started`: when this process began with it."""
    directory = directory_of(recipe, stage.name)
    try:
        output = stage.run(recipe, plan, directory)
    except StopRequested:
        _record_seconds(directory, time.monotonic() - started)
        raise
    _record_seconds(directory, time.monotonic() - started)
    plan = stage.complete(recipe, plan)
    commit(
        directory,
        stage.kind,
        files=output.files,
        config=plan.config,
        counts=output.counts,
        versions=base_versions() | output.versions,
        parents=plan.parents,
        lineage=plan.lineage,
    )


def _execute_shared(
    stage: Stage, share: Callable[[Recipe, Plan, Path], None], recipe: Recipe, plan: Plan
) -> None:
    """As one worker of however many there are: return once the stage is committed, by whichever of them."""
    directory, started = directory_of(recipe, stage.name), time.monotonic()
    with stopping_at_once(f"{stage.name}: stopped on request: the shards that were whole are kept"):
        _open_lock(directory).close()
        _begin(stage, directory, plan)
        for parent, manifest in _parents_of(recipe, plan).items():
            verify_files(parent, manifest)
        try:
            share(recipe, plan, directory)
        except StopRequested:
            _record_seconds(directory, time.monotonic() - started)
            raise
        make_once(directory / MANIFEST, lambda: _make(stage, recipe, plan, started))
    remove_claims(directory)
    clear_temporaries(directory)


def _parents_of(recipe: Recipe, plan: Plan) -> dict[Path, Manifest]:
    """The artifacts about to be read, by directory."""
    names = [parent.path for parent in plan.parents.values() if parent.kind == "artifact"]
    directories = [directory_of(recipe, name) for name in names]
    return {directory: load_manifest(directory) for directory in directories}


def _verify_parents_together(recipe: Recipe, plan: Plan) -> None:
    """Re-hash every file of the artifacts about to be read, each rank its share. Every rank calls.

    DataError, in every rank, naming one that is damaged.
    """
    # Here, for it imports torch, which `lopd status` need not wait for.
    from megatron_lopd.training.consensus import on_rank_zero, verify_together

    verify_together(on_rank_zero(lambda: _parents_of(recipe, plan)))


@contextmanager
def _sole_worker(directory: Path) -> Iterator[None]:
    """Hold the stage's directory against a second run of it. The lock goes with the process."""
    with _open_lock(directory) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LopdError(f"{directory}: another lopd is at work here: wait for it, or end it") from None
        yield


def _open_lock(directory: Path) -> IO[str]:
    """The stage's lock file, its directory made if need be. ConfigError where that cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return (directory / LOCK_FILE).open("w")
    except OSError as error:
        raise ConfigError(f"run_dir: {directory} cannot be written: {error.strerror}") from None


def unchanged_manifest(recipe: Recipe, stage: str, kind: str | None = None) -> Manifest:
    """The committed manifest of a stage, after re-hashing the files modified since it was written.

    Whoever goes on to read the files has them all re-hashed (`execute`), and so does `lopd verify`.
    DataError when the stage has not run, or a file is damaged.
    """
    directory = directory_of(recipe, stage)
    manifest = load_manifest(directory, kind)
    verify_files(directory, manifest, since=(directory / MANIFEST).stat().st_mtime_ns)
    return manifest


def check_unchanged(stage: Stage, recipe: Recipe) -> None:
    """A committed stage must be what the recipe would make now, and its files what it committed.

    Raises LineageError or DataError.
    """
    directory = directory_of(recipe, stage.name)
    manifest = unchanged_manifest(recipe, stage.name, stage.kind)
    plan = stage.complete(recipe, stage.plan(recipe))
    if recipe.allow_teacher_mismatch and "teacher" in manifest.parents:
        plan.parents["teacher"] = manifest.parents["teacher"]  # the one that made it, whoever comes after
    _refuse_change(stage.name, directory, manifest.config, manifest.parents, plan)


def is_main_rank() -> bool:
    """Whether this process writes: the only one, or rank 0 of a training job."""
    return int(os.environ.get("RANK", "0")) == 0


def base_versions() -> dict[str, str]:
    """The versions that every stage's numbers depend on."""
    versions = {"megatron-lopd": megatron_lopd.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "megatron-core", "transformer-engine"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return versions


def seconds_of(directory: Path) -> float:
    """Seconds a stage has taken over all its attempts, as far as they ended; 0 when unknown."""
    path = directory / TIMING_FILE
    try:
        return float(read_json(path)["seconds"])
    except (DataError, TypeError, KeyError, ValueError):
        return 0.0  # a duration is not worth stopping a run for


def _begin(stage: Stage, directory: Path, plan: Plan) -> None:
    """Note what is being made, or check that what was begun here before is the same thing."""
    if begun_plan(directory) is None:
        parents_plain = {role: vars(parent) for role, parent in plan.parents.items()}
        private = directory / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        atomic_write_json(private, {"config": plan.config, "parents": parents_plain})
        publish(private, directory / PLAN_FILE)  # of two workers that begin, the first
    begun = begun_plan(directory)
    if begun is not None:
        _refuse_change(stage.name, directory, begun.config, begun.parents, plan)


def begun_plan(directory: Path) -> Plan | None:
    """What a stage was begun with, but for its lineage; None when it was not. DataError when damaged."""
    path = directory / PLAN_FILE
    if not path.is_file():
        return None
    begun = read_json(path)
    try:
        parents = {role: Parent(**parent) for role, parent in begun["parents"].items()}
        return Plan(begun["config"], parents, "proved")
    except (TypeError, KeyError, AttributeError):
        raise DataError(f"{path}: damaged: remove {directory} to make it again") from None


def check_begun(stage: Stage, recipe: Recipe) -> None:
    """What was begun of a stage must be what the recipe would make now. Raises LineageError or DataError."""
    directory = directory_of(recipe, stage.name)
    begun = begun_plan(directory)
    if begun is not None:
        _refuse_change(stage.name, directory, begun.config, begun.parents, stage.plan(recipe))


def _record_seconds(directory: Path, seconds: float) -> None:
    atomic_write_json(directory / TIMING_FILE, {"seconds": seconds_of(directory) + seconds})


def _refuse_change(
    stage: str, directory: Path, config: Mapping[str, Any], parents: Mapping[str, Parent], plan: Plan
) -> None:
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
                raise LineageError(
                    f"refused: the {role} that {stage} was made from has changed: {part} was {short(was)} "
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
