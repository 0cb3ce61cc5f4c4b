"""A stage's output: a directory that exists for others only once its manifest.json is there.

Files are committed one by one, each atomically; the manifest is written last and lists them all
with size and digest. The digest of the manifest is the artifact's id, so an id stands for every
byte. Nothing that depends on when or where a stage ran is in it: the same inputs give the same id.
The file itself carries its id and has one spelling only, so that no byte of it can change unnoticed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_lopd.errors import DataError
from megatron_lopd.files.digests import canonical_json, sha256_bytes, sha256_files
from megatron_lopd.files.reading import read_json
from megatron_lopd.files.writing import TEMPORARY_PREFIX, atomic_file, fsync_directory, fsync_file, remove

MANIFEST = "manifest.json"
FORMAT = "lopd-artifact"
VERSION = 2

LineageStatus = Literal["proved", "declared", "overridden"]


@dataclass(frozen=True)
class FileEntry:
    """A committed file: size in bytes and hex SHA-256."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Parent:
    """Something an artifact was made from.

    `kind` "artifact": `digests` is {"id": ...}; "model": the parts of its fingerprint; "file":
    {"sha256": ...}; "checkpoint": {"id": ..., "identity": ...}, of a training job that removes it in time.
    `path` is where it was found, for messages; artifacts of the same run are
    named by their stage alone.
    """

    kind: Literal["artifact", "model", "file", "checkpoint"]
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
    """Whether the artifact in `directory` is whole."""
    return (directory / MANIFEST).is_file()


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
    names = sorted(files)
    paths = [directory / name for name in names]
    for path in paths:
        fsync_file(path)
    digests = sha256_files(paths)
    entries = {
        name: FileEntry(path.stat().st_size, digest)
        for name, path, digest in zip(names, paths, digests, strict=True)
    }
    manifest = Manifest(kind, entries, dict(config), dict(counts), dict(versions), dict(parents), lineage)
    write_manifest(directory, manifest)
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Commit an artifact whose files are already hashed and flushed."""
    for parent in {(directory / name).parent for name in manifest.files}:
        fsync_directory(parent)
    with atomic_file(directory / MANIFEST, "w") as stream:
        stream.write(manifest.text())


def load_manifest(directory: Path, kind: str | None = None) -> Manifest:
    """Read a manifest. DataError when it is missing, damaged, of another format or of another `kind`."""
    path = directory / MANIFEST
    if not path.is_file():
        raise DataError(f"{directory}: not a committed artifact (no {MANIFEST}): run the stage that makes it")
    raw = read_json(path)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise DataError(f"{path}: not a manifest of this project (format {FORMAT!r})")
    if raw.get("version") != VERSION:
        raise DataError(
            f"{path}: format version {raw.get('version')}, this program reads {VERSION}: use the version of "
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
        whole = manifest.text().encode() == path.read_bytes()
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path}: damaged: a part is missing or of the wrong type ({error})") from None
    if not whole:
        raise DataError(
            f"{path}: damaged: it does not match its own digest: restore it or make the artifact again"
        )
    if manifest.lineage not in get_args(LineageStatus):
        raise DataError(
            f"{path}: damaged: lineage {manifest.lineage!r}: restore it or make the artifact again"
        )
    if kind is not None and manifest.kind != kind:
        raise DataError(f"{directory}: holds {manifest.kind}, not {kind}: give another path")
    return manifest


@dataclass(frozen=True)
class CommittedFile:
    """A file of an artifact, and what its manifest says of it."""

    path: Path
    entry: FileEntry
    artifact: Path

    def check_size(self) -> None:
        """Raise DataError when it is missing or not of the size it was committed with."""
        if not self.path.is_file():
            raise DataError(
                f"{self.path}: missing: the manifest lists it; restore it or make the artifact again"
            )
        size = self.path.stat().st_size
        if size != self.entry.size:
            raise DataError(
                f"{self.path}: damaged: {size} bytes, the manifest says {self.entry.size}: "
                f"restore it or remove {self.artifact} to make it again"
            )

    def check_digest(self, digest: str) -> None:
        """Raise DataError when `digest` is not the one it was committed with."""
        if digest != self.entry.sha256:
            raise DataError(
                f"{self.path}: damaged: SHA-256 {digest[:12]}, the manifest says {self.entry.sha256[:12]}: "
                f"restore it or remove {self.artifact} to make it again"
            )


def committed_files(artifact: Path, manifest: Manifest) -> list[CommittedFile]:
    """The files of an artifact, by name."""
    return [CommittedFile(artifact / name, entry, artifact) for name, entry in manifest.files.items()]


def share_of(files: Iterable[CommittedFile], rank: int, size: int) -> list[CommittedFile]:
    """What `rank` of `size` takes of them: as many bytes as the others, as near as whole files allow."""
    shares: list[list[CommittedFile]] = [[] for _ in range(size)]
    held = [0] * size
    for file in sorted(files, key=lambda each: (-each.entry.size, str(each.path))):
        least = held.index(min(held))
        shares[least].append(file)
        held[least] += file.entry.size
    return shares[rank]


def verify(files: Sequence[CommittedFile]) -> None:
    """Re-hash files. DataError naming the first, in their order, that is missing or not what it was."""
    for file in files:
        file.check_size()
    for file, digest in zip(files, sha256_files(file.path for file in files), strict=True):
        file.check_digest(digest)


def verify_files(directory: Path, manifest: Manifest, since: int | None = None) -> None:
    """Re-hash every file, or only those modified after `since` (nanoseconds since the epoch).

    DataError naming the first that is missing or differs from the manifest.
    """
    files = committed_files(directory, manifest)
    for file in files:
        file.check_size()
    verify([file for file in files if since is None or file.path.stat().st_mtime_ns > since])


def clear_temporaries(directory: Path) -> None:
    """Remove what a killed writer left under temporary names, anywhere below `directory`.

    Several may do so at once: what is gone by then is no error.
    """
    for place, directories, files in os.walk(directory):
        for name in (*directories, *files):
            if name.startswith(TEMPORARY_PREFIX):
                with suppress(FileNotFoundError):
                    remove(Path(place, name))
