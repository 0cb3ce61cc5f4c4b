"""Whether a committed artifact is as it was, unread: by the stamps that its files had when they were hashed.

Those are kept in the user's cache, as a hint: what is trained on is hashed all the same. Without a cache, and
on another machine's first look, all is hashed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_lopd.artifacts.committed import ANY_DEVICE, CommittedFile, known_of, verify
from megatron_lopd.artifacts.manifest import Manifest, committed_files
from megatron_lopd.artifacts.stamps import Stamp
from megatron_lopd.artifacts.user_cache import keep_hints, read_hints

KIND = "artifacts"
Known = Mapping[str, tuple[Stamp, str]]


def verify_unchanged(directory: Path, manifest: Manifest) -> None:
    """Hash the files of an artifact that have another stamp than when they were last hashed, by this user.

    DataError naming the first that is missing or not as it was committed.
    """
    kept, files = _kept(directory), committed_files(directory, manifest)
    for file in files:
        file.check_size()
    changed = [file for file in files if not file.has_stamp(kept)]
    verify(changed)
    if changed:
        _keep(directory, files, kept)


def remember(directory: Path, manifest: Manifest) -> None:
    """Keep the stamps of an artifact whose files this process has hashed."""
    _keep(directory, committed_files(directory, manifest), {})


def _about(directory: Path) -> str:
    return str(directory.resolve())


def _kept(directory: Path) -> dict[str, tuple[Stamp, str]]:
    """By `CommittedFile.key`; nothing of what is no stamp."""
    try:
        raw = read_hints(KIND, _about(directory))
        return {key: ((ANY_DEVICE, *stamp), digest) for key, (*stamp, digest) in raw.items()}
    except (TypeError, ValueError):
        return {}


def _keep(directory: Path, files: Sequence[CommittedFile], kept: Known) -> None:
    # Without the device: a home that machines share has another number on each.
    known = {file.key: kept[file.key] for file in files if file.key in kept} | known_of(files)
    keep_hints(KIND, _about(directory), {key: [*at[1:], digest] for key, (at, digest) in known.items()})
