"""A stage's output: a directory that exists for others only once its manifest.json is there.

Files are committed one by one, each atomically; the manifest is written last and lists them all
with size and digest. The digest of the manifest is the artifact's id, so an id stands for every
byte. Nothing that depends on when or where a stage ran is in it: the same inputs give the same id.
The file itself carries its id and has one spelling only, so that no byte of it can change unnoticed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from megatron_lopd.artifacts.committed import CommittedFile, FileEntry, seal, verify
from megatron_lopd.errors import ConfigError, DataError
from megatron_lopd.files.digests import canonical_json, sha256_bytes
from megatron_lopd.files.reading import is_there, parse_json, read_bytes, read_text
from megatron_lopd.files.writing import TEMPORARY_PREFIX, atomic_file, fsync_directory, remove

MANIFEST = "manifest.json"
FORMAT = "lopd-artifact"
VERSION = 4

MAX_NAME_BYTES = 1024  # of a file in an artifact, its folders included

LineageStatus = Literal["proved", "declared", "overridden"]
ParentKind = Literal["artifact", "model", "file", "checkpoint"]
V = TypeVar("V")


@dataclass(frozen=True)
class Parent:
    """Something an artifact was made from.

    `kind` "artifact": `digests` is {"id": ...}; "model": the parts of its fingerprint; "file":
    {"sha256": ...}; "checkpoint": {"id": ..., "identity": ...}, of a training job that removes it in time.
    `path` is where it was found, for messages; artifacts of the same run are
    named by their stage alone.
    """

    kind: ParentKind
    path: str
    digests: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """What an artifact is, holds and was made from."""

    kind: str
    files: dict[str, FileEntry]
    config: dict[str, Any]
    counts: dict[str, int]
    versions: dict[str, str]
    parents: dict[str, Parent]
    lineage: LineageStatus

    def to_plain(self) -> dict[str, Any]:
        """What the manifest says, as JSON values."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @property
    def id(self) -> str:
        """Hex SHA-256 of the manifest: the artifact's identity."""
        return sha256_bytes(canonical_json(self.to_plain()))

    def text(self) -> str:
        """The one text that manifest.json may hold for it, its id included."""
        plain = {**self.to_plain(), "id": self.id}
        return json.dumps(plain, indent=2, sort_keys=True, allow_nan=False) + "\n"


def is_committed(directory: Path) -> bool:
    """Whether there is a manifest in `directory`, which then must be a whole artifact."""
    return is_there(directory / MANIFEST)


def commit(
    directory: Path,
    kind: str,
    *,
    files: Iterable[str],
    config: Mapping[str, Any],
    counts: Mapping[str, int],
    versions: Mapping[str, str],
    parents: Mapping[str, Parent],
    lineage: LineageStatus,
) -> Manifest:
    """Hash `files` (paths relative to `directory`), flush them, and write the manifest, last."""
    entries = seal(directory, sorted(files))
    manifest = Manifest(kind, entries, dict(config), dict(counts), dict(versions), dict(parents), lineage)
    write_manifest(directory, manifest)
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Commit an artifact whose files are already hashed and flushed. DataError where it would not be read."""
    if problem := _problem(manifest):
        raise DataError(f"{directory / MANIFEST}: {problem}: report this as a defect")
    for parent in {(directory / name).parent for name in manifest.files}:
        fsync_directory(parent)
    with atomic_file(directory / MANIFEST, "w") as stream:
        stream.write(manifest.text())


def load_manifest(directory: Path, kind: str | None = None) -> Manifest:
    """Read a manifest. DataError when it is missing, damaged, of another format or of another `kind`."""
    path = directory / MANIFEST
    if not is_committed(directory):
        raise DataError(f"{directory}: not a committed artifact (no {MANIFEST}): run the stage that makes it")
    raw = parse_json(read_text(path, follow_links=False), str(path))
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise DataError(f"{path}: not a manifest of this project (format {FORMAT!r})")
    if raw.get("version") != VERSION:
        version = str(raw.get("version"))[:20]
        raise DataError(
            f"{path}: format version {version}, this program reads {VERSION}: use the version of "
            "megatron-lopd that wrote it, or make the artifact again"
        )
    try:
        manifest = Manifest(
            kind=raw["kind"],
            files={name: FileEntry(**entry) for name, entry in raw["files"].items()},
            config=raw["config"],
            counts=raw["counts"],
            versions=raw["versions"],
            parents={role: Parent(**parent) for role, parent in raw["parents"].items()},
            lineage=raw["lineage"],
        )
        problem = _problem(manifest)
    except (KeyError, TypeError, AttributeError) as error:
        problem = f"a part is missing or of the wrong type ({error})"
    if problem is None and manifest.text().encode() != read_bytes(path, follow_links=False):
        problem = "it does not match its own digest"
    if problem is not None:
        raise DataError(f"{path}: damaged: {problem}: restore it or make the artifact again")
    if kind is not None and manifest.kind != kind:
        raise DataError(f"{directory}: holds {manifest.kind}, not {kind}: give another path")
    return _naming(path, manifest)


class _Part(dict[str, V]):
    """Part of a manifest. What is asked of it and is not there is told as what is damaged is: DataError."""

    where, what = Path(MANIFEST), "parts"

    def __missing__(self, name: str) -> V:
        lacking = f"no {shown(name)} in its {self.what}"
        raise DataError(f"{self.where}: damaged: {lacking}: restore it or make the artifact again")


def _part(where: Path, what: str, said: Mapping[str, V]) -> _Part[V]:
    part = _Part(said)
    part.where, part.what = where, what
    return part


def _naming(path: Path, manifest: Manifest) -> Manifest:
    """The same, whose parts name the file and themselves where one lacks what a reader needs."""
    parents = {
        role: replace(parent, digests=_part(path, f"parent {shown(role)}", parent.digests))
        for role, parent in manifest.parents.items()
    }
    return replace(
        manifest,
        config=_part(path, "config", manifest.config),
        counts=_part(path, "counts", manifest.counts),
        parents=_part(path, "parents", parents),
    )


def _problem(manifest: Manifest) -> str | None:
    """What is wrong with the types and names in a manifest, in a few words; None for nothing."""
    for part, each, known in (
        ("kind", manifest.kind, isinstance(manifest.kind, str)),
        ("counts", manifest.counts, _maps_to(manifest.counts, _is_count)),
        ("versions", manifest.versions, _maps_to(manifest.versions, _is_text)),
        ("lineage", manifest.lineage, manifest.lineage in get_args(LineageStatus)),
    ):
        if not known:
            return f"{part} {shown(each)}"
    for name, entry in manifest.files.items():
        if not is_plain_path(name) or name.casefold() == MANIFEST:
            return f"the file name {shown(name)}"
        if not _is_count(entry.size) or not is_digest(entry.blake3):
            return f"size or digest of {name}"
    return problem_of(manifest.config, manifest.parents)


def problem_of(config: Any, parents: Mapping[str, Parent]) -> str | None:
    """What is wrong with the types and names in what something was made from, in a few words."""
    if not isinstance(config, dict):
        return f"config {shown(config)}"
    for role, parent in parents.items():
        named_by_path = parent.kind in ("artifact", "checkpoint")
        if parent.kind not in get_args(ParentKind) or not _maps_to(parent.digests, _is_text):
            return f"the parent {shown(role)}"
        if not _is_text(parent.path) or (named_by_path and not is_plain_path(parent.path)):
            return f"the path of the parent {shown(role)}, {shown(parent.path)}"
    return None


def is_plain_path(name: Any) -> bool:
    """Whether it names something below a directory, in one way only, that any file system can hold."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and "\\" not in name
        and len(name.encode()) <= MAX_NAME_BYTES
        and all(part not in ("", ".", "..") and len(part.encode()) <= 255 for part in name.split("/"))
    )


def shown(value: Any) -> str:
    """A value from a file, short enough for a line."""
    return repr(value)[:80]


def _maps_to(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(holds, value.values()))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def is_digest(value: Any) -> bool:
    """Whether it is a SHA-256 or a BLAKE3 as manifests write them."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def plan_digest(config: Mapping[str, Any], parents: Mapping[str, Parent]) -> str:
    """Hex SHA-256 of all that decides what a stage makes. Its shards, and its job's checkpoints, carry it."""
    return sha256_bytes(canonical_json([config, {role: each.digests for role, each in parents.items()}]))


def committed_files(artifact: Path, manifest: Manifest) -> list[CommittedFile]:
    """The files of an artifact, by name."""
    return [CommittedFile(artifact, name, entry) for name, entry in manifest.files.items()]


def committed_file(artifact: Path, manifest: Manifest, name: str) -> CommittedFile:
    """One of them. DataError when the manifest does not list it."""
    if name not in manifest.files:
        raise DataError(f"{artifact / name}: not part of {artifact}: its {MANIFEST} does not list it")
    return CommittedFile(artifact, name, manifest.files[name])


def copy_committed(artifact: Path, manifest: Manifest, folder: str, target: Path) -> list[str]:
    """Copy what a manifest lists in a folder to `target`, and nothing else there; returns the names."""
    files = [file for file in committed_files(artifact, manifest) if file.name.startswith(f"{folder}/")]
    names = [file.name.removeprefix(f"{folder}/") for file in files]
    for file, name in zip(files, names, strict=True):
        with file.open() as stream, atomic_file(target / name) as copy:
            copy.write(stream.read())
    return names


def require_listed(folder: Path) -> None:
    """Raise DataError for a file in a folder of an artifact that is no part of it, yet could be loaded.

    A `folder` in no artifact is nobody's; in one, hidden files and notes (.md) are.
    """
    place = folder.resolve()  # "." and links too lie in an artifact
    for artifact in place.parents:
        try:
            manifest = load_manifest(artifact)
        except DataError:  # none, or another project's
            continue
        within = f"{place.relative_to(artifact)}/"
        for name in unlisted_files(artifact, manifest):
            ignored = os.path.basename(name).startswith(".") or name.endswith(".md")
            if name.startswith(within) and not ignored:
                file = folder / name.removeprefix(within)
                raise DataError(
                    f"{file}: not part of {artifact}, whose {MANIFEST} does not list it, yet what loads "
                    f"{folder} may read it: remove it"
                )


def verify_files(directory: Path, manifest: Manifest) -> None:
    """Hash every file that this process has not. DataError naming the first that is not as committed."""
    verify(committed_files(directory, manifest))


def unlisted_files(directory: Path, manifest: Manifest) -> list[str]:
    """What lies below an artifact's directory, relative to it, and is no part of it; no link is followed."""
    found = []
    for place, folders, files in os.walk(directory):
        links = [name for name in folders if os.path.islink(Path(place, name))]
        found += [os.path.relpath(Path(place, name), directory) for name in (*files, *links)]
    return sorted(set(found) - manifest.files.keys() - {MANIFEST})


def refuse_links(run_dir: Path, directory: Path) -> None:
    """Raise ConfigError where writing to an artifact's directory would lead out of it: a link is a folder's.

    Checkpoints may be elsewhere: those are read by their digests, and a link to one goes by its own name.
    """
    parts = directory.relative_to(run_dir).parts
    folders = [run_dir.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1)]
    for place, names, _ in os.walk(directory):
        folders += [Path(place, name) for name in names if os.path.basename(place) != "checkpoints"]
    for folder in folders:
        if folder.is_symlink():
            raise ConfigError(
                f"run_dir: {folder} is a link to {os.readlink(folder)}: a run writes below its own directory "
                "alone: put a directory there, or set run_dir to where there is room"
            )


def clear_temporaries(directory: Path) -> None:
    """Remove what a killed writer left under temporary names, anywhere below `directory`.

    Several may do so at once: what is gone by then is no error.
    """
    for place, directories, files in os.walk(directory):
        for name in (*directories, *files):
            if name.startswith(TEMPORARY_PREFIX):
                with suppress(FileNotFoundError):
                    remove(Path(place, name))
