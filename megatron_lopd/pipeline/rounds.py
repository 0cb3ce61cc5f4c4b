"""The rounds of a run whose rollouts are refreshed: their steps, samples, artifacts and proofs.

With train.refresh_every = N, round r trains steps [rN, (r+1)N). Round 0 reads run_dir/rollout and
run_dir/score; round r reads run_dir/refresh-0r/{student,rollout,score}, made from the checkpoint at rN.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lopd.artifacts.lineage import (
    WHOLE_MODEL,
    Proof,
    artifact_parent,
    prove_parent,
    prove_same,
    read_model_lineage,
    short,
)
from megatron_lopd.artifacts.manifest import Manifest, Parent, is_committed, load_manifest, verify_files
from megatron_lopd.engines import kind_of
from megatron_lopd.errors import ConfigError, DataError, LineageError
from megatron_lopd.files.reading import is_there, read_object
from megatron_lopd.files.writing import atomic_write_json
from megatron_lopd.pipeline import proofs
from megatron_lopd.pipeline.plan_file import begun_plan
from megatron_lopd.pipeline.resolved import ResolvedRun
from megatron_lopd.pipeline.stage import Plan, identity_of
from megatron_lopd.training.checkpoints import KIND as CHECKPOINT
from megatron_lopd.training.checkpoints import checkpoint_name

if TYPE_CHECKING:
    from megatron_lopd.data.batch_plan import PlanPart
    from megatron_lopd.training.data_sources import CachedData

PARTS = ("student", "rollout", "score")
RECORD = "refreshes.json"  # in train's directory: the artifacts it has trained from
_DIRECTORY = re.compile(r"refresh-\d+")


@dataclass(frozen=True)
class Round:
    """Steps [first_step, end_step), trained from the rollouts of the student at `first_step`."""

    number: int
    first_step: int
    end_step: int

    def stage(self, part: str) -> str:
        """The name of the stage that makes a part ("student", "rollout", "score") of this round."""
        return f"refresh-{self.number:02d}/{part}" if self.number else part


def rounds_of(run: ResolvedRun) -> list[Round]:
    """All rounds of the recipe, the first one included; none when its rollouts are never refreshed."""
    config = run.train
    if config.refresh_every is None or config.steps is None:
        return []
    starts = range(0, config.steps, config.refresh_every)
    return [
        Round(number, first, min(first + config.refresh_every, config.steps))
        for number, first in enumerate(starts)
    ]


def is_made(run: ResolvedRun, each: Round) -> bool:
    """Whether everything that `each` trains from is committed."""
    return all(run.is_committed(each.stage(part)) for part in ("rollout", "score"))


def missing_round(run: ResolvedRun) -> Round | None:
    """The first round whose rollouts are yet to be made; None when every round has its own."""
    return next((each for each in rounds_of(run)[1:] if not is_made(run, each)), None)


def due_round(run: ResolvedRun, *, rehash: bool = True) -> Round | None:
    """The round to make now: the first that is missing, once training has come to where it begins.

    With `rehash` a damaged checkpoint is not taken for one that is there: train makes it again.
    """
    each = missing_round(run)
    if each is None:
        return None
    if run.is_committed(each.stage("student")):
        return each
    try:
        checkpoint_of(run, each, rehash=rehash)
    except DataError:
        return None
    return each


def checkpoint_of(run: ResolvedRun, each: Round, *, rehash: bool) -> tuple[Path, Manifest]:
    """Train's checkpoint that a round's student is made from, re-hashed if asked: that reads all of it.

    Raises DataError when it is not there or damaged, LineageError when it is another job's.
    """
    path = run.directory_of("train") / "checkpoints" / checkpoint_name(each.first_step)
    manifest = load_manifest(path, CHECKPOINT)
    if rehash:
        verify_files(path, manifest)
    if manifest.config["identity"] != train_identity(run):
        raise LineageError(
            f"refused: {path} is of another job than {run.directory_of('train')} was begun with: "
            "remove it to train to there again"
        )
    return path, manifest


def train_identity(run: ResolvedRun) -> str:
    """The identity of the training job that was begun. DataError when none was."""
    directory = run.directory_of("train")
    begun = begun_plan(directory)
    if begun is None:
        raise DataError(f"{directory}: training has not begun: run lopd train first")
    return identity_of(begun)


def part_of(run: ResolvedRun, each: Round) -> PlanPart:
    """The steps of a round, in the data order of the whole run."""
    from megatron_lopd.data.batch_plan import BatchPlan, PlanPart

    size = run.manifest("rollout").counts["samples"]
    plan = BatchPlan(size, run.train.global_batch_size, run.recipe.seed)
    return PlanPart(plan, each.first_step, each.end_step, visited_only=each.number > 0)


def data_of(run: ResolvedRun, each: Round) -> CachedData:
    """The samples of a round. DataError when they are not just those that its steps visit."""
    from megatron_lopd.data.dataset import open_shards
    from megatron_lopd.data.schemas import ROLLOUTS
    from megatron_lopd.training.data_sources import CachedData

    rollout_dir = run.directory_of(each.stage("rollout"))
    data = CachedData(rollout_dir, run.directory_of(each.stage("score")))
    if each.number:
        whole = open_shards(ROLLOUTS, run.directory_of("rollout")).sample_ids
        visited = part_of(run, each).visited
        for index in range(max(len(visited), len(data))):
            expected = whole[int(visited[index])] if index < len(visited) else "none"
            found = data.sample_ids[index] if index < len(data) else "none"
            if expected != found:
                raise DataError(
                    f"{rollout_dir}: sample {index} is {found}, and steps {each.first_step + 1} to "
                    f"{each.end_step} visit {expected} there: remove {rollout_dir.parent} to make it again"
                )
    return data


def require_engines(run: ResolvedRun) -> None:
    """Raise ConfigError unless what the refreshes yet to come need is here: the teacher, and the engines."""

    if missing_round(run) is None:
        return
    teacher = run.teacher
    if not teacher.directory.is_dir():
        raise ConfigError(
            f"train.refresh_every: {teacher.directory} is not there, and the teacher scores what the student "
            "samples anew: restore it, or leave train.refresh_every empty to train from the cached scores"
        )
    teacher.check()
    split = run.scoring.engine.options.layout
    if split is not None and split.ranks_multiple > 1:
        raise ConfigError(
            f"train.refresh_every scores in one process, and its layout makes it "
            f"{split.ranks_multiple} ({split.product}): set its sizes to 1, or score.engine.name to another"
        )
    for section, engine in (("rollout", run.recipe.rollout.engine), ("score", run.recipe.score.engine)):
        kind_of(engine).require(engine, section)


def prove_student(run: ResolvedRun, each: Round, identity: str) -> tuple[Manifest, Parent]:
    """A round's student artifact and its model, after proving which checkpoint it was made from.

    Raises LineageError when that is not the one of the job `identity` at the round's first step, DataError
    for what is missing or damaged.
    """
    stage = each.stage("student")
    directory = run.directory_of(stage)
    manifest = run.unchanged_manifest(stage, "model")
    step, made_from = manifest.config["step"], manifest.parents["checkpoint"]
    theirs = made_from.digests["identity"]
    if (step, theirs) != (each.first_step, identity):
        raise LineageError(
            f"refused: {directory} was made from step {step} of job {short(theirs)} ({made_from.path}), and "
            f"this round begins at step {each.first_step} of job {short(identity)}: remove "
            f"{directory.parent} to make it again"
        )
    lineage = read_model_lineage(directory / "model")
    if lineage is None:
        raise DataError(f"{directory}: its lineage file is missing: remove {directory} to make it again")
    return manifest, Parent("model", str(directory / "model"), lineage.model)


def prove_round(run: ResolvedRun, each: Round, identity: str) -> tuple[list[Proof], dict[str, Manifest]]:
    """What training from a round >= 1 of the job `identity` stands on, and the round's manifests by part.

    Raises LineageError at the first thing that does not hold, DataError for what is missing or damaged.
    """
    student, model = prove_student(run, each, identity)
    rollout = run.unchanged_manifest(each.stage("rollout"), "rollouts")
    score = run.unchanged_manifest(each.stage("score"), "scores")
    for child, made_from, parent in (
        ("rollout", rollout.parents["model"], student),
        ("score", score.parents["rollouts"], rollout),
    ):
        directory = run.directory_of(made_from.path)
        prove_parent(each.stage(child), made_from.path, made_from, parent, directory)
    name, first, teacher = (
        f"refresh {each.number}",
        run.manifest("rollout"),
        score.parents["teacher"],
    )
    found = [
        prove_same(
            "the prompts are those of the first rollouts",
            proofs.evidence(rollout.parents["prompts"], f"{name}'s prompts"),
            proofs.evidence(first.parents["prompts"], "the first rollouts' prompts"),
            parts=("sha256",),
            allow=False,
        ),
        prove_same(
            f"the student that sampled is the one being trained, at step {each.first_step}",
            proofs.evidence(rollout.parents["student"], "the rollouts' student"),
            proofs.evidence(model, "the checkpoint's model"),
            parts=WHOLE_MODEL,
            allow=False,
        ),
        *proofs.prove_teacher(run, run.manifest("sft"), teacher),
        proofs.prove_tokens(run, teacher, rollout.parents["student"]),
    ]
    told = [replace(proof, statement=f"{name}: {proof.statement}") for proof in found]
    return told, {"student": student, "rollout": rollout, "score": score}


def with_rounds(run: ResolvedRun, plan: Plan) -> Plan:
    """Train's plan with the rollouts and scores of every refresh among its parents, all of them proved."""
    parents, statuses = dict(plan.parents), [plan.lineage]
    for each in rounds_of(run)[1:]:
        found, manifests = prove_round(run, each, identity_of(plan))
        for part in ("rollout", "score"):
            parents[each.stage(part)] = artifact_parent(each.stage(part), manifests[part])
        statuses.append(proofs.status_of(found, *(manifest.lineage for manifest in manifests.values())))
    return replace(plan, parents=parents, lineage=proofs.status_of([], *statuses))


def record_rounds(run: ResolvedRun, upto: Round) -> None:
    """Note which artifacts rounds 1 to `upto` are trained from. LineageError when they were others before."""
    path = run.directory_of("train") / RECORD
    before = read_object(path, follow_links=False) if is_there(path) else {}
    now = {
        each.stage(part): run.manifest(each.stage(part)).id
        for each in rounds_of(run)[1 : upto.number + 1]
        for part in ("rollout", "score")
    }
    for stage, manifest_id in now.items():
        was = before.get(stage, manifest_id)
        if was != manifest_id:
            raise LineageError(
                f"refused: {run.directory_of(stage)} has changed since train began with it: it was "
                f"{short(was)}, is now {short(manifest_id)}: restore it, or remove "
                f"{run.directory_of('train')} and the refreshes to train again"
            )
    if now.keys() - before.keys():
        atomic_write_json(path, before | now)


def whole_path(path: Path) -> Path:
    """From the root on, by the names that were given: a stage may be a link to where there is room. But ".."
    is of what they lead to, so that with it links are followed."""
    return path.resolve() if ".." in path.parts else path.absolute()


def run_directory(artifact: Path) -> Path:
    """The run that an artifact's directory belongs to."""
    parent = whole_path(artifact).parent
    is_round = _DIRECTORY.fullmatch(parent.name) and (parent.parent / "train").is_dir()
    return parent.parent if is_round else parent  # a run may have such a name too


def committed_parts(run_dir: Path) -> Iterator[Path]:
    """The committed artifacts of a run's refreshes, in order."""
    found = (path for path in run_dir.iterdir() if path.is_dir() and _DIRECTORY.fullmatch(path.name))
    for directory in sorted(found, key=lambda path: int(path.name.partition("-")[2])):
        yield from (directory / part for part in PARTS if is_committed(directory / part))
