"""`lopd verify`: re-hash an artifact, or every artifact of a run, and the links between them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_lopd.artifacts.lineage import LINEAGE_FILE, prove_parent, read_model_lineage, short
from megatron_lopd.artifacts.manifest import is_committed, load_manifest, verify_files
from megatron_lopd.errors import DataError
from megatron_lopd.pipeline.rounds import committed_parts, run_directory


def verify_path(path: Path) -> Iterator[str]:
    """Yield a line for each thing that holds. DataError or LineageError at the first that does not."""
    artifacts = [path] if is_committed(path) else artifacts_of(path)
    if not artifacts:
        raise DataError(f"{path}: neither an artifact nor a run directory: nothing here is committed")
    for directory in artifacts:
        yield from _verify_artifact(directory)


def artifacts_of(run: Path) -> list[Path]:
    """What is committed in a run's directory. DataError where there is no directory."""
    stages = sorted(child for child in _children(run) if is_committed(child))
    return [*stages, *committed_parts(run)]


def _children(path: Path) -> list[Path]:
    if not path.is_dir():
        raise DataError(f"{path}: no such directory")
    return [child for child in path.iterdir() if child.is_dir()]


def _verify_artifact(directory: Path) -> Iterator[str]:
    manifest = load_manifest(directory)
    verify_files(directory, manifest)
    size = sum(entry.size for entry in manifest.files.values())
    title = f"{manifest.kind} {short(manifest.id)}, {manifest.lineage}"
    yield f"{directory}: {title}: {len(manifest.files)} files, {size:,} bytes, intact"
    for role, parent in manifest.parents.items():
        if parent.kind == "artifact":
            origin = run_directory(directory) / parent.path
            proof = prove_parent(directory.name, role, parent, load_manifest(origin), origin)
            yield f"{directory}: {proof.statement}: {proof.detail}"
        elif parent.kind == "checkpoint" and is_committed(origin := run_directory(directory) / parent.path):
            proof = prove_parent(directory.name, role, parent, load_manifest(origin), origin)
            yield f"{directory}: {proof.statement}: {proof.detail}"
    for carrier in sorted(directory.glob(f"*/{LINEAGE_FILE}")):
        model = carrier.parent
        lineage = read_model_lineage(model)
        assert lineage is not None
        weights = short(lineage.model["weights"])
        yield f"{model}: weights {weights}, made by {lineage.made_by}, {lineage.status}"
