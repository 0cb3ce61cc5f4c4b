"""Whether a committed artifact is as it was, unread: by the stamps that its files had when they were hashed.

Those are kept in the user's cache, as a hint: what is trained on is hashed all the same. Without a cache, and
on another machine's first look, all is hashed here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_lopd.artifacts.committed import ANY_DEVICE, CommittedFile, Stamp, known_of, verify
from megatron_lopd.artifacts.digest_cache import user_cache
from megatron_lopd.artifacts.manifest import Manifest, committed_files
from megatron_lopd.errors import DataError
from megatron_lopd.files.reading import read_object
from megatron_lopd.files.writing import atomic_write_json

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


def _place(directory: Path) -> Path:
    name = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()
    return user_cache() / "artifacts" / f"{name}.json"


def _kept(directory: Path) -> dict[str, tuple[Stamp, str]]:
    """By `CommittedFile.key`; nothing where there is none to be read, or others could have made it."""
    place = _place(directory)
    try:
        if not all(map(_is_private, (place.parent, place))):
            return {}
        raw: dict[str, Any] = read_object(place, follow_links=False)
        return {key: ((ANY_DEVICE, *stamp), digest) for key, (*stamp, digest) in raw.items()}
    except (DataError, OSError, TypeError, ValueError):
        return {}


def _is_private(path: Path) -> bool:
    """Whether this user alone can have written it."""
    found = path.lstat()
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022 and not path.is_symlink()


def _keep(directory: Path, files: Sequence[CommittedFile], kept: Known) -> None:
    # Without the device: a home that machines share has another number on each.
    known = {file.key: kept[file.key] for file in files if file.key in kept} | known_of(files)
    try:
        _place(directory).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        atomic_write_json(_place(directory), {key: [*at[1:], digest] for key, (at, digest) in known.items()})
    except (OSError, DataError):  # a full or read-only disk: they are hashed again
        return
