"""What one user's processes remember for each other: hints, which are never needed and never evidence.

They are in that user's own directory (LOPD_CACHE, else lopd below XDG_CACHE_HOME, else ~/.cache/lopd), for
the user alone to read and write. What others could have written is not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_lopd.errors import DataError
from megatron_lopd.files.reading import read_object
from megatron_lopd.files.writing import atomic_write_text

CACHE_VARIABLE = "LOPD_CACHE"


def user_cache() -> Path:
    """The user's directory for what can be made again."""
    if place := os.environ.get(CACHE_VARIABLE):
        return Path(place)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "lopd"


def read_hints(kind: str, about: str) -> dict[str, Any]:
    """What was kept; nothing where nothing was, it cannot be read, or others could have written it."""
    place = _place(kind, about)
    try:
        return read_object(place, follow_links=False) if _is_private(place) else {}
    except (DataError, OSError):
        return {}


def keep_hints(kind: str, about: str, hints: Mapping[str, Any]) -> None:
    """Keep them, in the place of what was; nothing where that cannot be written, as on a full disk."""
    place = _place(kind, about)
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_users_alone(place.parent):
            atomic_write_text(place, json.dumps(dict(hints)), permissions=0o600)
    except (OSError, DataError):
        return


def _place(kind: str, about: str) -> Path:
    return user_cache() / kind / f"{hashlib.sha256(os.fsencode(about)).hexdigest()}.json"


def _is_private(place: Path) -> bool:
    return _is_users_alone(place.parent) and _is_users_alone(place)


def _is_users_alone(path: Path) -> bool:
    """Whether nobody but this user can have written it."""
    try:
        found = path.lstat()
    except OSError:
        return False
    kinds = stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)
    return kinds and found.st_uid == os.geteuid() and not found.st_mode & 0o022
