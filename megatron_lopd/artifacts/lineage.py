"""What is proved about where things came from, and the refusal when it does not hold.

Teacher consistency (arXiv 2604.13010): the model that answered the SFT prompts must be the model
that scores the rollouts. It is proved by comparing fingerprints that were taken when each was read,
never by comparing names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lopd.artifacts.fingerprint import Fingerprint
from megatron_lopd.artifacts.manifest import LineageStatus, Manifest, Parent, is_digest, is_plain_path
from megatron_lopd.artifacts.model_files import model_files
from megatron_lopd.artifacts.weights_digest import weights_digest
from megatron_lopd.errors import DataError, LineageError
from megatron_lopd.files.reading import is_there, read_object
from megatron_lopd.files.writing import atomic_write_json

LINEAGE_FILE = "lopd_lineage.json"
LINEAGE_FORMAT = "lopd-model-lineage"
_VERSION = 3  # of the digests in it, too
OVERRIDE = "allow_teacher_mismatch=true"
WHOLE_MODEL = ("weights", "config", "tokenizer", "chat_template", "end_tokens")
_WORST_LAST: tuple[LineageStatus, ...] = ("proved", "declared", "overridden")


@dataclass(frozen=True)
class Evidence:
    """The digests of something, and where they were read: "score's teacher (models/t)"."""

    digests: Mapping[str, str]
    where: str


@dataclass(frozen=True)
class Proof:
    """A statement about the run, whether it was proved, and what it rests on."""

    statement: str
    status: LineageStatus
    detail: str


@dataclass(frozen=True)
class ModelLineage:
    """What a model written by this project says of itself: who taught it, and how sure that is."""

    model: dict[str, str]
    made_by: str
    status: LineageStatus
    teacher: Parent | None
    chain: dict[str, dict[str, Any]]


def worst(statuses: Iterable[LineageStatus]) -> LineageStatus:
    """The weakest of several: a chain is as good as its weakest link. "proved" for none."""
    return max(statuses, key=_WORST_LAST.index, default="proved")


def prove_same(
    statement: str, left: Evidence, right: Evidence, *, parts: Iterable[str], allow: bool
) -> Proof:
    """Prove that two things have equal digests in `parts`.

    Raises LineageError naming the part, both digests and where each came from, unless `allow`
    (recipe key allow_teacher_mismatch), when the proof is "overridden".
    """
    for part in parts:
        ours, theirs = left.digests.get(part, "none"), right.digests.get(part, "none")
        if ours != theirs:
            detail = f"{part} differs: {short(ours)} of {left.where}, {short(theirs)} of {right.where}"
            if allow:
                return Proof(statement, "overridden", detail)
            raise LineageError(
                f"refused: {statement} does not hold: {detail}: use the same one, or override with {OVERRIDE}"
            )
    agreed = ", ".join(f"{part} {short(left.digests[part])}" for part in parts)
    return Proof(statement, "proved", f"{agreed}: {left.where} and {right.where}")


def prove_parent(child: str, role: str, recorded: Parent, parent: Manifest, directory: Path) -> Proof:
    """Prove that the artifact in `directory` is the one `child` was made from. LineageError if not."""
    if recorded.digests.get("id") != parent.id:
        was = short(recorded.digests.get("id", "none"))
        raise LineageError(
            f"refused: {child} was made from {role} {was}, but {directory} now holds {short(parent.id)}: "
            f"restore it, or remove {child} and what follows to make them again"
        )
    return Proof(f"{child} was made from this {role}", "proved", f"manifest {short(parent.id)}")


def short(digest: str) -> str:
    """A digest as shown to people: its first 12 hex digits.

    What stands for one (`random, seed 17`) is shown as it is, up to a digest's length.
    """
    return digest[:12] if is_digest(digest) else digest[:64]


def artifact_parent(stage: str, manifest: Manifest) -> Parent:
    """A committed artifact of this run as somebody's parent."""
    return Parent("artifact", stage, {"id": manifest.id})


def model_parent(directory: str | Path, fingerprint: Fingerprint) -> Parent:
    """A model as somebody's parent."""
    return Parent("model", str(directory), fingerprint.parts())


def write_model_lineage(directory: Path, lineage: ModelLineage) -> None:
    """Write `lopd_lineage.json` beside a model's weights, so that the chain goes on from there."""
    teacher = lineage.teacher
    plain = {
        "format": LINEAGE_FORMAT,
        "version": _VERSION,
        "model": lineage.model,
        "made_by": lineage.made_by,
        "status": lineage.status,
        "teacher": None if teacher is None else {"path": teacher.path, "digests": teacher.digests},
        "chain": lineage.chain,
    }
    atomic_write_json(directory / LINEAGE_FILE, plain)


def read_model_lineage(directory: str | Path) -> ModelLineage | None:
    """The lineage a model carries, or None when it carries none.

    Raises LineageError when the file speaks of other weights than those beside it, DataError when
    it is malformed.
    """
    path = Path(directory) / LINEAGE_FILE
    if not is_there(path):
        return None
    raw = read_object(path)
    try:
        if raw["format"] != LINEAGE_FORMAT or raw["status"] not in _WORST_LAST:
            raise DataError(
                f"{path}: not a lineage file of this project: remove it to treat the model as foreign"
            )
        if raw["version"] != _VERSION:
            raise DataError(
                f"{path}: of version {raw['version']}, this program reads {_VERSION}: another release wrote "
                "it: remove it to treat the model as foreign"
            )
        lineage = _lineage(raw)
        recorded = lineage.model["weights"]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path}: damaged: a part is missing, or of another type ({error}): restore it, or remove it to "
            "treat the model as foreign"
        ) from None
    actual = weights_digest(model_files(directory))
    if recorded != actual:
        raise LineageError(
            f"refused: {path} describes weights {short(recorded)}, but those beside it are {short(actual)}: "
            "restore the weights, or remove the file to treat the model as foreign"
        )
    return lineage


def _lineage(raw: dict[str, Any]) -> ModelLineage:
    """Of what the file says. KeyError or TypeError where that is not what `write_model_lineage` writes."""
    teacher, chain = raw["teacher"], raw["chain"]
    if teacher is not None:
        teacher = Parent("model", _text(_mapping(teacher)["path"]), _texts(teacher["digests"]))
    for stage, made in _mapping(chain).items():
        _text(_mapping(made)["id"])
        if not is_plain_path(stage):
            raise TypeError(f"{stage!r} is no stage")
    return ModelLineage(_texts(raw["model"]), _text(raw["made_by"]), raw["status"], teacher, chain)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is no object")
    return value


def _texts(value: Any) -> dict[str, str]:
    return {key: _text(each) for key, each in _mapping(value).items()}
