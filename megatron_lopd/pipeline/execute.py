"""Running one stage: skip it if it is committed, else run or resume it, and commit."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

import megatron_lopd
from megatron_lopd.artifacts.digest_cache import relying_on_hints, require_as_hashed
from megatron_lopd.artifacts.lineage import prove_parent, worst
from megatron_lopd.artifacts.manifest import (
    MANIFEST,
    Manifest,
    clear_temporaries,
    commit,
    is_committed,
    load_manifest,
    refuse_links,
    verify_files,
)
from megatron_lopd.artifacts.model_files import model_files
from megatron_lopd.artifacts.unchanged import remember
from megatron_lopd.errors import ConfigError, DataError, LineageError, LopdError, StopRequested
from megatron_lopd.files.reading import read_object
from megatron_lopd.files.writing import atomic_write_json, open_to_append
from megatron_lopd.pipeline.plan_file import begin, begun_plan, has_parts, refuse_change
from megatron_lopd.pipeline.resolved import ResolvedRun
from megatron_lopd.pipeline.stage import Plan, SharedStage, Stage
from megatron_lopd.pipeline.verified import verify_unless_told
from megatron_lopd.runtime.claim_files import claimed_places, remove_claims, remove_claims_below
from megatron_lopd.runtime.claims import commit_once, hold
from megatron_lopd.runtime.signals import stopping_at_once

TIMING_FILE = "timing.json"
LOCK_FILE = ".lock"
BEGINNING_SECONDS = 30.0  # that a worker waits for one that has begun, which writes a file or two
LONGEST_SECONDS = 1e10  # three centuries: a number beyond is no time that a stage took
# What a file system says that has no locks, or whose lock server is not there: NFS, Lustre without -o flock.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


def execute(stage: Stage, run: ResolvedRun) -> bool:
    """Run `stage` unless it is committed. Returns whether anything was done.

    Every rank of a stage that has several calls: rank 0 plans, proves and commits, the others follow.
    Raises LineageError when what is committed, or was begun, is not what the recipe now asks for.
    """
    directory = run.directory_of(stage.name)
    if is_committed(directory):
        if is_main_rank():
            check_unchanged(stage, run)
            if isinstance(stage, SharedStage) and claimed_places(directory):  # who committed was killed then
                _clear(directory)
        return False
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from megatron_lopd.training.consensus import meet

        meet()  # rank 0 has models to hash first, and proofs to make
    if is_main_rank():
        refuse_links(run.directory, directory)
    if not is_main_rank():
        _follow(stage, run)
    elif isinstance(stage, SharedStage):
        _execute_shared(stage, run, stage.plan(run))
    else:
        plan = stage.plan(run)
        with _sole_worker(directory):
            clear_temporaries(directory)
            begin(stage.name, directory, plan, alone=True)
            _verify_together(run, plan)
            _make(stage, run, plan, time.monotonic())
        remove_claims(directory)
    return True


def _follow(stage: Stage, run: ResolvedRun) -> None:
    """As a rank above 0. Of a shared stage it knows no plan: rank 0 alone is one of its workers."""
    nothing = Plan({}, {}, "proved")
    stage.follow(run, nothing if isinstance(stage, SharedStage) else _verify_together(run, nothing))


def _make(stage: Stage, run: ResolvedRun, plan: Plan, started: float) -> None:
    """Do the stage's work and commit what it made. `started`: when this process began with it."""
    directory = run.directory_of(stage.name)
    try:
        output = stage.commit(run, plan)
    except StopRequested:
        _record_seconds(directory, time.monotonic() - started)
        raise
    _record_seconds(directory, time.monotonic() - started)
    _require_models(plan)
    plan = stage.complete(run, plan)
    _require_artifacts(stage.name, run, plan)
    manifest = commit(
        directory,
        stage.kind,
        files=output.files,
        config=plan.config,
        counts=output.counts,
        versions=base_versions() | output.versions,
        parents=plan.parents,
        lineage=plan.lineage,
    )
    remember(directory, manifest)


def _require_models(plan: Plan) -> None:
    """DataError where a model that was hashed for the plan is there and has changed since."""
    for parent in plan.parents.values():
        directory = Path(parent.path)
        if parent.kind == "model" and directory.is_dir():
            files = model_files(directory, weights=not parent.digests["weights"].startswith("random"))
            require_as_hashed(files.all)


def _require_artifacts(stage: str, run: ResolvedRun, plan: Plan) -> None:
    """Raise unless the artifacts of the plan are still what they were when this process hashed them.

    Whatever was read of them by its path was then what their manifests say. What is gone by now was read.
    LineageError where another is in the place of one, DataError where a file has changed.
    """
    for role, parent in plan.parents.items():
        directory = run.directory / parent.path
        if parent.kind in ("artifact", "checkpoint") and is_committed(directory):
            manifest = load_manifest(directory)
            prove_parent(stage, role, parent, manifest, directory)
            verify_files(directory, manifest)


def _execute_shared(stage: SharedStage, run: ResolvedRun, plan: Plan) -> None:
    """As one worker of however many there are: return once the stage is committed, by whichever of them."""
    directory, started = run.directory_of(stage.name), time.monotonic()
    with (
        stopping_at_once(f"{stage.name}: stopped on request: the shards that were whole are kept"),
        _open_lock(directory) as lock,
    ):
        try:
            _begin_among_workers(stage.name, directory, plan, lock)
            verify_unless_told(parents_of(run, plan))
            stage.share(run, plan)
        except StopRequested:
            with suppress(DataError):  # the disk is full; another has committed, and cleared up
                _record_seconds(directory, time.monotonic() - started)
            raise
        except DataError:
            if not is_committed(directory):  # else what was in the way is what the others have done
                raise
            check_unchanged(stage, run)
        commit_once(
            directory / MANIFEST,
            lambda: _make(stage, run, plan, started),
            lambda: _clear(directory),
        )


def _clear(directory: Path) -> None:
    """Remove what workers leave beside a committed artifact; last its claims, which say that there is any.

    Another may be at it too, and be killed: by the time that the temporary names are looked for, no claims
    below are left for it to put under one.
    """
    remove_claims_below(directory)
    clear_temporaries(directory)
    remove_claims(directory)


def parents_of(run: ResolvedRun, plan: Plan) -> dict[Path, Manifest]:
    """The artifacts about to be read, by directory."""
    names = [parent.path for parent in plan.parents.values() if parent.kind == "artifact"]
    directories = [run.directory_of(name) for name in names]
    return {directory: load_manifest(directory) for directory in directories}


def _verify_together(run: ResolvedRun, plan: Plan) -> Plan:
    """Re-hash every file of the artifacts about to be read, each rank its share. Every rank calls.

    Returns rank 0's plan. DataError, in every rank, naming a file that is damaged.
    """
    # Here, for it imports torch, which `lopd status` need not wait for.
    from megatron_lopd.training.consensus import on_rank_zero, verify_together

    plan, artifacts = on_rank_zero(lambda: (plan, parents_of(run, plan)))
    verify_together(artifacts)
    return plan


@contextmanager
def _sole_worker(directory: Path) -> Iterator[None]:
    """Hold the stage's directory against a second run of it. The lock goes with the process.

    Where the file system has no locks a claim takes its place, whose heartbeat tells that this process lives.
    """
    with _open_lock(directory) as stream, ExitStack() as held:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LopdError(f"{directory}: another lopd is at work here: wait for it, or end it") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise ConfigError(f"run_dir: {directory} cannot be locked: {error.strerror}") from None
            held.enter_context(hold(directory, LOCK_FILE))
        yield


def _begin_among_workers(stage: str, directory: Path, plan: Plan, lock: IO[str]) -> None:
    """`begin`, as one worker of several. Each shares the lock until it ends: who has it alone is alone.

    Nobody is known to be alone on a file system without locks, nor beside one who has begun and is stuck.
    """
    alone = _is_locked(lock, fcntl.LOCK_EX)
    until = time.monotonic() + BEGINNING_SECONDS
    while not alone and _is_locked(lock, fcntl.LOCK_SH) is False and time.monotonic() < until:
        time.sleep(0.05)  # another has begun, and has it alone for a moment
    begin(stage, directory, plan, alone=bool(alone))
    if alone:
        _is_locked(lock, fcntl.LOCK_SH)


def _is_locked(lock: IO[str], how: int) -> bool | None:
    """Whether the lock is had now; None where the file system has no locks."""
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _open_lock(directory: Path) -> IO[str]:
    """The stage's lock file, its directory made if need be. ConfigError where that cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir: {directory} cannot be written: {error.strerror}") from None
    return open_to_append(directory / LOCK_FILE, ConfigError)


@relying_on_hints()
def check_unchanged(stage: Stage, run: ResolvedRun) -> None:
    """A committed stage must be what the recipe would make now, and its files what it committed.

    Nothing is made of it, so that models which look as they did are not hashed. Raises LineageError or
    DataError.
    """
    directory = run.directory_of(stage.name)
    manifest = run.unchanged_manifest(stage.name, stage.kind)
    plan = stage.complete(run, stage.plan(run))
    if run.recipe.allow_teacher_mismatch and "teacher" in manifest.parents:
        plan.parents["teacher"] = manifest.parents["teacher"]  # the one that made it, whoever comes after
    refuse_change(stage.name, directory, manifest.config, manifest.parents, plan)
    if worst([plan.lineage, manifest.lineage]) != manifest.lineage and not run.recipe.allow_teacher_mismatch:
        raise LineageError(
            f"refused: {directory} was {manifest.lineage} when it was made, and is {plan.lineage} now: lopd "
            f"verify {directory} says why: restore that, or remove {directory} and what follows to make them "
            "again"
        )


@relying_on_hints()
def check_begun(stage: Stage, run: ResolvedRun) -> None:
    """What was made of a stage must be what the recipe would make now. Raises LineageError or DataError.

    Who goes on from it hashes the models by then.
    """
    directory = run.directory_of(stage.name)
    begun = begun_plan(directory) if has_parts(directory) else None
    if begun is not None:
        refuse_change(stage.name, directory, begun.config, begun.parents, stage.plan(run))


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
    try:
        seconds = read_object(directory / TIMING_FILE, follow_links=False).get("seconds")
    except DataError:
        return 0.0  # a duration is not worth stopping a run for
    if isinstance(seconds, int | float) and 0 <= seconds < LONGEST_SECONDS:
        return float(seconds)
    return 0.0


def _record_seconds(directory: Path, seconds: float) -> None:
    atomic_write_json(directory / TIMING_FILE, {"seconds": seconds_of(directory) + seconds})
