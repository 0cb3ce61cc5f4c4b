"""Why an artifact's lineage is what its manifest says: each link of its chain, from the manifests alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_lopd.artifacts.fingerprint import fingerprint_model
from megatron_lopd.artifacts.lineage import (
    LINEAGE_FILE,
    OVERRIDE,
    WHOLE_MODEL,
    Evidence,
    Proof,
    prove_parent,
    prove_same,
    short,
    worst,
)
from megatron_lopd.artifacts.manifest import Manifest, Parent, committed_file, is_committed, load_manifest
from megatron_lopd.errors import DataError, LineageError
from megatron_lopd.pipeline.carried import carried_lineage
from megatron_lopd.pipeline.plan_file import begun_plan
from megatron_lopd.pipeline.proofs import SAME_STUDENT, SAME_TEACHER, SAME_TOKENS, evidence
from megatron_lopd.pipeline.stage import identity_of

EVALUATED = {"sft": "sft", "lightning_opd": "export"}  # by role, who made the model
VOICE = ("tokenizer", "chat_template", "end_tokens")  # what of a model training leaves alone, and copies
CHECKPOINTS = "checkpoints"  # the folder, in the directory of the stage that trains


def links(run_dir: Path, stage: str, manifest: Manifest) -> Iterator[Proof]:
    """What the artifact of `stage` rests on, its parents' own links left out.

    Raises LineageError for a parent that is another now, DataError for one that is missing or damaged.
    """
    for role, parent in manifest.parents.items():
        directory = run_dir / parent.path
        if parent.kind == "artifact" or (parent.kind == "checkpoint" and is_committed(directory)):
            found = _load_parent(run_dir, stage, parent.path)
            proof = prove_parent(stage, role, parent, found, directory)
            yield Proof(proof.statement, worst([proof.status, found.lineage]), proof.detail)
    if manifest.kind == "checkpoint" and "identity" in manifest.config:
        yield from _job(run_dir / stage, manifest)
    yield from _teacher(run_dir, stage, manifest)
    yield from _student(run_dir, stage, manifest)


def chain(run_dir: Path, stage: str, manifest: Manifest) -> dict[str, list[Proof]]:
    """The `links` of a stage's artifact and of all that it comes from, by stage, the first made first.

    Raises as `links`, and DataError where one was made from itself.
    """
    found: dict[str, list[Proof]] = {}
    line = [(stage, manifest)]  # each made from the next
    while line:
        name, made = line[-1]
        left = (each.path for each in made.parents.values() if each.kind == "artifact")
        parent = next((path for path in left if path not in found), None)
        if parent is None:
            found[name] = list(links(run_dir, name, made))
            line.pop()
        elif parent in (each for each, _ in line):
            raise DataError(
                f"{run_dir / name}: damaged: its manifest has it made from {parent}, which was made from it: "
                "restore it or make the artifact again"
            )
        else:
            line.append((parent, _load_parent(run_dir, name, parent)))
    return found


def _load_parent(run_dir: Path, stage: str, parent: str) -> Manifest:
    """What `stage` was made from. DataError, naming both, where that is not there."""
    if not is_committed(run_dir / parent):
        raise DataError(
            f"{run_dir / stage}: made from {parent}, and no committed artifact is there: restore it or make "
            "both again"
        )
    return load_manifest(run_dir / parent)


def require_as_good(directory: Path, manifest: Manifest, found: list[Proof]) -> None:
    """Raise LineageError when an artifact calls itself better than what it rests on."""
    status = worst(proof.status for proof in found)
    if worst([status, manifest.lineage]) != manifest.lineage:
        weakest = next(proof for proof in found if proof.status == status)
        raise LineageError(
            f"refused: {directory} calls itself {manifest.lineage}, yet it is {status} that "
            f"{weakest.statement} ({weakest.detail}): its manifest is not what made it: "
            f"remove {directory} to make it again"
        )


def _teacher(run_dir: Path, stage: str, manifest: Manifest) -> Iterator[Proof]:
    """Who the teacher is, as it was when this was made, and where that is known from."""
    teacher, data = manifest.parents.get("teacher"), manifest.parents.get("data")
    if data is not None and data.kind == "file":
        yield _declared_answers(teacher, data)
    elif stage == "sft" and data is None:
        yield _taken_checkpoint(run_dir / stage, manifest, teacher)
    elif teacher is None or manifest.kind == "evaluation":
        return
    elif data is not None:
        answered = _parent(run_dir, data.path, "teacher")
        yield _same(
            "the SFT data's teacher is the one that answered",
            evidence(teacher, "sft's teacher"),
            evidence(answered, f"{data.path}'s teacher"),
        )
    elif stage == "generate":
        weights = short(teacher.digests.get("weights", "none"))
        yield Proof("this teacher answered", "proved", f"weights {weights} of {teacher.path}, when it did")
    elif "teacher" in load_manifest(run_dir / "sft").parents:
        answered = _parent(run_dir, "sft", "teacher")
        yield _same(
            SAME_TEACHER, evidence(teacher, "who scores"), evidence(answered, "the SFT data's teacher")
        )


def _declared_answers(teacher: Parent | None, data: Parent) -> Proof:
    if teacher is None:
        return Proof(f"nothing says which teacher wrote {data.path}", "declared", "sft.teacher is not set")
    return Proof(f"{teacher.path} wrote {data.path}", "declared", "sft.teacher says so, and nothing else")


def _taken_checkpoint(directory: Path, manifest: Manifest, teacher: Parent | None) -> Proof:
    """Who taught a student that was made elsewhere. LineageError where that is proved no longer."""
    student = manifest.parents["student"]
    if teacher is None:
        return Proof(f"nothing says who taught {student.path}", "declared", "sft.teacher is not set")
    said = f"sft.teacher or {LINEAGE_FILE} says so, and no artifact that is here"
    if manifest.lineage == "proved":
        said = f"{LINEAGE_FILE} in it, and the artifact that it names"
        checkpoint = Path(student.path)
        if not checkpoint.is_dir() or not _is_model(checkpoint, student):
            said += ", when it was made: the model is not there to be looked at again"
        elif reason := _why_taught_by_another(checkpoint, teacher):
            raise LineageError(
                f"refused: {directory} was proved by the lineage of {checkpoint}, and is no longer: "
                f"{reason}: restore that, or remove {directory} and what follows to make them again"
            )
    return Proof(f"{teacher.path} taught {student.path}", manifest.lineage, said)


def _is_model(directory: Path, model: Parent) -> bool:
    found = fingerprint_model(directory).parts()
    return all(found[part] == model.digests.get(part) for part in WHOLE_MODEL)


def _why_taught_by_another(checkpoint: Path, teacher: Parent) -> str:
    """Why a model does not prove by its lineage that it is `teacher`'s; empty where it does."""
    carried = carried_lineage(checkpoint)
    if carried is None:
        return f"{checkpoint / LINEAGE_FILE} is missing"
    if carried.status != "proved":
        return carried.reason or f"it calls itself {carried.status}"
    named = carried.lineage.teacher
    return "" if named is not None and named.digests == teacher.digests else "it names another teacher"


def _student(run_dir: Path, stage: str, manifest: Manifest) -> Iterator[Proof]:
    """That the students and their tokens are those of what this was made from."""
    parents = manifest.parents
    student, sampled, scored = (parents.get(role) for role in ("student", "rollout", "rollouts"))
    if manifest.kind == "rollouts" and student is not None:
        made_by = parents.get("model") or parents.get("sft")
        if made_by is not None:
            yield from _made(run_dir, made_by.path, student, "the student that sampled")
    if manifest.kind == "model" and student is not None and "sft" in parents:
        yield from _made(run_dir, parents["sft"].path, student, "the student before it was trained")
        if (written := _model_in(run_dir / stage, manifest)) is not None:
            ours, theirs = Evidence(written, "what it made"), evidence(student, "that student")
            yield _same("it speaks as that student does", ours, theirs, VOICE)
    if manifest.kind == "evaluation":
        for role, maker in EVALUATED.items():
            if role in parents:
                yield from _made(run_dir, maker, parents[role], f"the model graded as {role}")
    if manifest.kind == "scores" and scored is not None:
        yield _same(
            SAME_TOKENS,
            evidence(parents["teacher"], "the teacher"),
            evidence(_parent(run_dir, scored.path, "student"), "the student"),
            ("tokenizer", "chat_template"),
        )
    if student is not None and sampled is not None:
        first = _parent(run_dir, sampled.path, "student")
        yield _same(SAME_STUDENT, evidence(first, "who sampled"), evidence(student, "who was trained"))


def _made(run_dir: Path, maker: str, model: Parent, who: str) -> Iterator[Proof]:
    """That a model is the one that a stage of this run made, or took from elsewhere."""
    made = load_manifest(run_dir / maker)
    if (said := _model_in(run_dir / maker, made)) is not None:
        theirs = Evidence(said, f"what {maker} made")
        yield _same(f"{who} is what {maker} made", evidence(model, "it"), theirs)
    elif (taken := made.parents.get("student")) is not None:
        yield _same(f"{who} is what {maker} took", evidence(model, "it"), evidence(taken, f"{maker}'s"))


def _model_in(directory: Path, manifest: Manifest) -> dict[str, str] | None:
    """The digests of the model that an artifact holds; None where it holds none."""
    if f"model/{LINEAGE_FILE}" not in manifest.files:
        return None
    file = committed_file(directory, manifest, f"model/{LINEAGE_FILE}")
    said = file.read_json()
    model = said.get("model") if isinstance(said, dict) else None
    if not isinstance(model, dict) or not all(isinstance(model.get(part), str) for part in WHOLE_MODEL):
        raise DataError(f"{file.path}: damaged: it has not the digests of a model: make the artifact again")
    return model


def _job(directory: Path, manifest: Manifest) -> Iterator[Proof]:
    """That a checkpoint is of the job that its stage was begun for."""
    begun = begun_plan(directory.parent.parent) if directory.parent.name == CHECKPOINTS else None
    if begun is None:
        return
    identity, ours = manifest.config["identity"], identity_of(begun)
    if identity != ours:
        raise LineageError(
            f"refused: {directory} is of another job ({short(str(identity))}) than "
            f"{directory.parent.parent} was begun for ({short(ours)}): remove it"
        )
    yield Proof("it is of the job that was begun here", "proved", f"plan {short(ours)}")


def _parent(run_dir: Path, stage: str, role: str) -> Parent:
    found = load_manifest(run_dir / stage).parents.get(role)
    if found is None:
        raise DataError(f"{run_dir / stage}: its manifest names no {role}: remove it to make it again")
    return found


def _same(statement: str, left: Evidence, right: Evidence, parts: Sequence[str] = WHOLE_MODEL) -> Proof:
    proof = prove_same(statement, left, right, parts=parts, allow=True)
    if proof.status == "overridden":
        return Proof(statement, proof.status, f"{proof.detail}; {OVERRIDE} let it pass")
    return proof
