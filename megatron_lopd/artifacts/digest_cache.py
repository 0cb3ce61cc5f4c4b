"""Digests that need not be taken twice: of files that are, by all that their directory says, as they were.

A digest is kept beside the files it is of, or where that directory cannot be written, in the user's cache
(LOPD_CACHE, or lopd below XDG_CACHE_HOME), where the other processes of the same user find it. It counts only
while every file has the inode, size and times that it had: any write, and any copy, changes one of them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_lopd.errors import DataError
from megatron_lopd.files.reading import read_json
from megatron_lopd.files.writing import atomic_write_json

CACHE_NAME = ".lopd_fingerprint.json"
CACHE_VARIABLE = "LOPD_CACHE"


def stamp(path: Path) -> list[int]:
    """What changes when a file is written or replaced: inode, bytes, time of its content, time of change.

    Times in nanoseconds since the epoch.
    """
    found = path.stat()
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def user_cache() -> Path:
    """The user's directory for what can be made again."""
    if place := os.environ.get(CACHE_VARIABLE):
        return Path(place)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "lopd"


def digest_of(
    root: Path, part: str, files: Sequence[Path], about: Mapping[str, Any], make: Callable[[], str]
) -> str:
    """The digest `make()` takes of `files` below `root`, kept under the name `part`.

    `about` is what else it depends on, as JSON values.
    """
    key = _key(root, files, about)
    found = _lookup(root, part, key)
    if found is None:
        found = make()
        _keep(root, part, {"key": key, "digest": found})
    return found


def is_kept(root: Path, part: str, files: Sequence[Path], about: Mapping[str, Any]) -> bool:
    """Whether `digest_of` would take nothing anew."""
    return _lookup(root, part, _key(root, files, about)) is not None


def _key(root: Path, files: Sequence[Path], about: Mapping[str, Any]) -> dict[str, Any]:
    # The path too: a directory that was copied with its cache is another.
    return {
        "path": str(root.resolve()),
        "files": {str(path.relative_to(root)): stamp(path) for path in files},
        **about,
    }


def _places(root: Path) -> tuple[Path, Path]:
    """Beside the files, and in the user's cache."""
    name = hashlib.sha256(str(root.resolve()).encode()).hexdigest()
    return root / CACHE_NAME, user_cache() / "fingerprints" / f"{name}.json"


def _lookup(root: Path, part: str, key: dict[str, Any]) -> str | None:
    for place in _places(root):
        entry = _read(place).get(part)
        if isinstance(entry, dict) and entry.get("key") == key and isinstance(entry.get("digest"), str):
            return str(entry["digest"])
    return None


def _keep(root: Path, part: str, entry: dict[str, Any]) -> None:
    """In the first place that can be written; nowhere, where none can: it will be taken again."""
    for place in _places(root):
        try:
            if place.parent != root or os.access(root, os.W_OK):
                atomic_write_json(place, _read(place) | {part: entry})
                return
        except (OSError, DataError):  # a full disk; a file system that is read-only whatever the modes say
            continue


def _read(path: Path) -> dict[str, Any]:
    """What was kept; nothing when there is none or it cannot be read, for it can be made again."""
    try:
        kept = read_json(path)
    except (DataError, OSError):
        return {}
    return kept if isinstance(kept, dict) else {}
