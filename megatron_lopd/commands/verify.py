"""`lopd verify`: hash an artifact, a model in one, or all of a run, and say why its lineage is what it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_lopd.artifacts.committed import CommittedFile, verify
from megatron_lopd.artifacts.lineage import LINEAGE_FILE, read_model_lineage, short, worst
from megatron_lopd.artifacts.manifest import (
    Manifest,
    committed_files,
    is_committed,
    load_manifest,
    plan_digest,
    require_listed,
    unlisted_files,
)
from megatron_lopd.errors import DataError
from megatron_lopd.files.reading import is_directory, is_there, names_in
from megatron_lopd.pipeline.chain import CHECKPOINTS, chain, links, require_as_good
from megatron_lopd.pipeline.rounds import committed_parts, run_directory, whole_path

# What a stage keeps in its directory beside the artifact, and nothing after it reads.
OWN_FILES = frozenset({"plan.json", "timing.json", "times.jsonl", "refreshes.json", ".lock"})
OWN_FOLDERS = frozenset({CHECKPOINTS, "tensorboard", "hf", ".claims"})
SHARD = ".arrow"
SHOWN = 5  # names in a line


def verify_path(path: Path) -> Iterator[str]:
    """Yield a line for each thing that holds. DataError or LineageError at the first that does not."""
    _require_directory(path)
    if is_committed(path):
        yield from _verify_artifact(path, whole_chain=True)
        return
    artifacts = artifacts_of(path)
    for directory in artifacts:
        yield from _verify_artifact(directory, whole_chain=False)
    if artifacts:
        yield _verdict(path, artifacts)
    else:
        yield from _verify_model(path)


def artifacts_of(run: Path) -> list[Path]:
    """What is committed in a run's directory. DataError where there is no directory."""
    _require_directory(run)
    children = [run / name for name in names_in(run)]
    stages = [child for child in children if is_directory(child) and is_committed(child)]
    return [*stages, *committed_parts(run)]


def _require_directory(path: Path) -> None:
    if not is_directory(path):
        raise DataError(f"{path}: {'not a' if is_there(path) else 'no such'} directory")


def _verdict(run: Path, artifacts: list[Path]) -> str:
    """Of all that a run's directory holds: as good as the worst of it, and which that is."""
    lineages = {directory: load_manifest(directory).lineage for directory in artifacts}
    weakest = worst(lineages.values())
    which = [str(each.relative_to(run)) for each in artifacts if lineages[each] == weakest != "proved"]
    number = f"{len(artifacts)} artifact{'s' if len(artifacts) > 1 else ''}"
    return f"{run}: {number}, {weakest}{': ' if which else ''}{_listed(which)}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _verify_artifact(directory: Path, *, whole_chain: bool) -> Iterator[str]:
    manifest = load_manifest(directory)
    files = committed_files(directory, manifest)
    yield _intact(directory, manifest, files)
    for file in files:
        if file.path.name == "config.json":
            require_listed(file.path.parent)
    if others := _others(directory, manifest):
        yield f"{directory}: no part of it, and not read: {_listed(others)}"
    yield from _why(directory, manifest, whole_chain)
    for file in files:
        if file.path.suffix == SHARD:
            _require_of_plan(file.path, manifest)
    for carrier in sorted(file.path for file in files if file.path.name == LINEAGE_FILE):
        yield _carried(carrier.parent)


def _verify_model(path: Path) -> Iterator[str]:
    """A model's directory: part of an artifact, or by itself, with what it says of itself."""
    around = (*path.parents, *whole_path(path).parents)
    artifact = next((each for each in around if is_committed(each)), None)
    if artifact is None:
        if not is_there(path / LINEAGE_FILE):
            raise DataError(
                f"{path}: neither an artifact, a run directory nor a model: nothing here is committed"
            )
        yield _carried(path, "says of itself: ")
        yield f"{path}: declared: {LINEAGE_FILE} says so, and the artifact that it is from is not around it"
        return
    manifest = load_manifest(artifact)
    within = f"{whole_path(path).relative_to(whole_path(artifact))}/"
    files = [file for file in committed_files(artifact, manifest) if file.name.startswith(within)]
    if not files:
        raise DataError(f"{path}: no part of {artifact}: its manifest lists nothing there")
    yield _intact(path, manifest, files)
    require_listed(path)
    yield from _why(artifact, manifest, whole_chain=True)
    if is_there(path / LINEAGE_FILE):
        yield _carried(path)


def _intact(path: Path, manifest: Manifest, files: list[CommittedFile]) -> str:
    verify(files)
    size = sum(file.entry.size for file in files)
    title = f"{manifest.kind} {short(manifest.id)}, {manifest.lineage}"
    return f"{path}: {title}: {len(files)} files, {size:,} bytes, intact"


def _require_of_plan(shard: Path, manifest: Manifest) -> None:
    """Raise DataError for a shard, listed as it may be, that another plan than this artifact's made."""
    from megatron_lopd.data.arrow_file import require_plan  # pyarrow, for shards alone

    require_plan(shard, plan_digest(manifest.config, manifest.parents))


def _others(directory: Path, manifest: Manifest) -> list[str]:
    names = unlisted_files(directory, manifest)
    return [name for name in names if name not in OWN_FILES and name.split("/")[0] not in OWN_FOLDERS]


def _why(directory: Path, manifest: Manifest, whole_chain: bool) -> Iterator[str]:
    """Each link that its lineage rests on, and in the end what made it less than proved."""
    run_dir = run_directory(directory)
    stage = str(whole_path(directory).relative_to(run_dir))
    found = chain(run_dir, stage, manifest) if whole_chain else {stage: list(links(run_dir, stage, manifest))}
    for name, proofs in found.items():
        for proof in proofs:
            yield f"  {name}: {proof.status}: {proof.statement}: {proof.detail}"
        require_as_good(run_dir / name, load_manifest(run_dir / name), proofs)
    weak = [proof.statement for each in found.values() for proof in each if proof.status == manifest.lineage]
    because = "of all that it rests on" if manifest.lineage == "proved" else "; ".join(dict.fromkeys(weak))
    yield f"{directory}: {manifest.lineage}, because {because or 'it was made so'}"


def _carried(model: Path, whose: str = "") -> str:
    """What a model's own file says; `whose` word that is, where no artifact bears it out."""
    lineage = read_model_lineage(model)
    assert lineage is not None  # it has the file
    weights = short(lineage.model["weights"])
    return f"{model}: weights {weights}, {whose}made by {lineage.made_by}, {lineage.status}"
