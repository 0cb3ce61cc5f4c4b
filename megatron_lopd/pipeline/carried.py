"""How much the lineage that a model carries is worth: what it claims, where its own artifact bears it out.

A file beside a model is a claim, which anybody could have written. The artifact that the model is of can bear
it out: the directory above it, with a manifest that lists the model's files as they are, and beside it the
artifacts that this was made from, by their ids. Otherwise the teacher in it is only declared.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_lopd.artifacts.committed import verify
from megatron_lopd.artifacts.fingerprint import fingerprint_model
from megatron_lopd.artifacts.lineage import LINEAGE_FILE, ModelLineage, read_model_lineage, worst
from megatron_lopd.artifacts.manifest import (
    LineageStatus,
    Manifest,
    committed_files,
    is_committed,
    load_manifest,
)
from megatron_lopd.artifacts.model_files import model_files
from megatron_lopd.pipeline.rounds import run_directory, whole_path


@dataclass(frozen=True)
class CarriedLineage:
    """What a model says of its making. `status`: how sure that is; `reason`: why it is not what it claims."""

    lineage: ModelLineage
    status: LineageStatus
    reason: str


def carried_lineage(model_dir: Path) -> CarriedLineage | None:
    """The lineage that a model carries, weighed; None when it carries none.

    Raises LineageError when it speaks of another model than the one beside it, DataError when it is
    malformed, or a file of its artifact is damaged.
    """
    lineage = read_model_lineage(model_dir)
    if lineage is None:
        return None
    artifact, reason = whole_path(model_dir).parent, ""
    if not is_committed(artifact):
        reason = f"{artifact} is not the artifact that it was committed in"
    else:
        manifest = load_manifest(artifact)
        reason = _why_not_its_own(artifact, manifest, model_dir, lineage)
        if not reason:
            return CarriedLineage(lineage, worst([lineage.status, manifest.lineage]), "")
    return CarriedLineage(lineage, worst([lineage.status, "declared"]), reason)


def _why_not_its_own(artifact: Path, manifest: Manifest, model_dir: Path, lineage: ModelLineage) -> str:
    """Why an artifact does not bear out the lineage of a model in it; empty where it does."""
    files = model_files(model_dir)
    read = {str(path.relative_to(model_dir)) for path in files.all} | {LINEAGE_FILE}
    prefix = f"{whole_path(model_dir).name}/"
    listed = {
        name.removeprefix(prefix): file
        for name, file in zip(manifest.files, committed_files(artifact, manifest), strict=True)
        if name.startswith(prefix)
    }
    if unlisted := sorted(read - listed.keys()):
        return f"{artifact}'s manifest does not list {prefix}{unlisted[0]}"
    # The weights are hashed as tensors, and compared with what the lineage file, which is verified, says.
    weights = {path.name for path in files.weights}
    verify([listed[name] for name in sorted(read - weights)])
    if lineage.model != fingerprint_model(model_dir).parts():
        return f"{LINEAGE_FILE} was written of another model, or by another release"
    run, teachers = run_directory(artifact), []
    for stage, known in lineage.chain.items():
        if not is_committed(run / stage) or (made_of := load_manifest(run / stage)).id != known["id"]:
            return f"{run / stage}, which it was made from, is not there as it was"
        teachers += [parent.digests for role, parent in made_of.parents.items() if role == "teacher"]
    if lineage.teacher is not None and lineage.teacher.digests not in teachers:
        return "none of the artifacts that it was made from has its teacher"
    return ""
