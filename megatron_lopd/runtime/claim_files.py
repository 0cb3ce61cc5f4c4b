"""What workers that share a directory say of themselves in it: the files of their claims, and no more.

`.claims/PART.N` is the N-th claim on a part, made once and rewritten whole; `.claims/parts` tells which parts
there are to be. All of it goes at once, by a rename, when the artifact is committed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_lopd.errors import DataError, Unreadable
from megatron_lopd.files.exclusive import take_name
from megatron_lopd.files.reading import is_there, naming, read_object, reading
from megatron_lopd.files.writing import TEMPORARY_PREFIX, errors_of_file
from megatron_lopd.runtime.display import shortened
from megatron_lopd.runtime.owner import Owner

CLAIMS = ".claims"
PARTS = "parts"  # no dot in it, as there is in every claim
LARGEST_CLAIM = 1 << 16  # bytes; an error that it tells of is shortened
READINGS = 5
REMOVALS = 20  # of a directory in which others, who do not know it is gone, may be making a last file

Status = Literal["working", "released", "failed"]


@dataclass(frozen=True)
class ClaimState:
    """What a claim's file says.

    `beat` counts heartbeats; `done` of `total` samples are made, at `rate` tokens/s and `done_per_second`.
    """

    part: str
    generation: int
    owner: Owner
    status: Status = "working"
    beat: int = 0
    done: int = 0
    total: int = 0
    rate: float = 0.0
    done_per_second: float = 0.0
    error: str = ""


def read_claims(directory: Path) -> dict[str, list[ClaimState]]:
    """The claims on each part of the artifact in `directory`, oldest first. DataError for a damaged one."""
    return {part: states for part in sorted(newest(directory)) if (states := claims_on(directory, part))}


def claims_on(directory: Path, part: str) -> list[ClaimState]:
    """The claims on one part, oldest first. DataError for a damaged one."""
    states: list[ClaimState] = []
    while True:
        path = claim_path(directory, part, len(states) + 1)
        try:
            plain = _read(path)
            if plain is None:
                return states
            states.append(_state(plain, part, len(states) + 1))
        except Unreadable:
            raise
        except (DataError, ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{path}: damaged: end all workers of {directory}, remove {path.parent} and start them again "
                f"({error})"
            ) from None


def _read(path: Path) -> dict[str, Any] | None:
    """What a claim's file holds; None where there is none. It may come, or go, between two looks."""
    for tries_left in reversed(range(READINGS)):
        if not is_there(path):
            return None
        try:
            return read_object(path, limit=LARGEST_CLAIM, follow_links=False)
        except DataError:
            if not tries_left:
                raise
    raise AssertionError


def _state(plain: dict[str, Any], part: str, generation: int) -> ClaimState:
    """Raises KeyError, TypeError or ValueError where `plain` is not what `text_of` writes."""
    owner = Owner(**_checked(Owner, plain.pop("owner")))
    state = ClaimState(owner=owner, **_checked(ClaimState, plain))
    if (state.part, state.generation) != (part, generation) or state.status not in get_args(Status):
        raise ValueError("it is not the claim that its name says")
    return state


def _checked(kind: type[Owner] | type[ClaimState], plain: Any) -> dict[str, Any]:
    types: dict[str, Any] = {"str": str, "int": int, "float": int | float, "Status": str}
    wanted = {field.name: types[str(field.type)] for field in fields(kind) if field.name != "owner"}
    if not isinstance(plain, dict) or plain.keys() != wanted.keys():
        raise TypeError("its keys are not a claim's")
    wrong = [name for name, value in plain.items() if not isinstance(value, wanted[name])]
    if wrong:
        raise TypeError(f"{wrong[0]} is of another type")
    return plain


def text_of(state: ClaimState) -> str:
    """What a claim's file holds."""
    error = shortened(state.error).encode(errors="replace").decode()
    return json.dumps(vars(state) | {"owner": vars(state.owner), "error": error})


def claim_path(directory: Path, part: str, generation: int) -> Path:
    """The file of one claim."""
    return directory / CLAIMS / f"{part}.{generation}"


def newest(directory: Path) -> dict[str, int]:
    """The highest generation of claim on each part, from the files' names alone.

    DataError where they cannot be listed.
    """
    highest: dict[str, int] = {}
    with reading(directory / CLAIMS), contextlib.suppress(FileNotFoundError):
        for name in os.listdir(directory / CLAIMS):
            part, _, generation = name.rpartition(".")
            if generation.isascii() and generation.isdecimal() and not name.startswith(TEMPORARY_PREFIX):
                highest[part] = max(highest.get(part, 0), int(generation[:18]))
    return highest


def make_claims_directory(directory: Path) -> None:
    """Have `directory`, and its `.claims`. DataError where something else is there, or none can be made."""
    place = directory / CLAIMS
    try:
        # "It is there already", and then it is not, when the artifact is committed this moment.
        with contextlib.suppress(FileExistsError):
            place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_made(directory, error) from None
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISDIR(os.lstat(place).st_mode):
            raise DataError(f"{place}: not a directory of this program's: remove it")


def create_claim(directory: Path, state: ClaimState) -> bool:
    """Whether this process, and no other, made the claim's file. DataError where none can be made."""
    try:
        temporary = _temporary(directory, text_of(state))
        try:
            return take_name(temporary, claim_path(directory, state.part, state.generation))
        finally:
            temporary.unlink(missing_ok=True)
    except FileNotFoundError:  # the artifact has been committed
        return False
    except OSError as error:
        raise _not_made(directory, error) from None


def _not_made(directory: Path, error: OSError) -> DataError:
    return DataError(
        f"{directory / CLAIMS}: a claim cannot be made: {error.strerror}: free some space, make it writable, "
        "or choose another run_dir"
    )


def rewrite(directory: Path, path: Path, text: str) -> None:
    """Put `text` into a file of the claims' directory, whole, whatever is there. Raises OSError."""
    os.replace(_temporary(directory, text), path)


def _temporary(directory: Path, text: str) -> Path:
    """The text in a file of a name of its own, whole."""
    path = directory / CLAIMS / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
    try:
        with naming(path), path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return path


def announce(directory: Path, samples: Mapping[str, int]) -> None:
    """Tell whoever looks on which parts there are to be, with the samples of each. DataError if it cannot."""
    make_claims_directory(directory)
    path = directory / CLAIMS / PARTS
    with errors_of_file(path), contextlib.suppress(FileNotFoundError):  # committed, this moment
        rewrite(directory, path, json.dumps(dict(samples)))


def announced(directory: Path) -> dict[str, int]:
    """What `announce` told of the artifact in `directory`; nothing where nobody works. DataError for what it
    cannot have told."""
    path = directory / CLAIMS / PARTS
    if not is_there(path):
        return {}
    told = read_object(path, follow_links=False)
    if not all(isinstance(count, int) for count in told.values()):
        raise DataError(f"{path}: damaged: not the samples of each part: any worker that starts mends it")
    return told


def claimed_places(directory: Path) -> list[Path]:
    """`directory` and those below it in which parts are claimed, by name."""
    # Not Path.rglob: it stumbles over what goes while it looks.
    return sorted(Path(place) for place, names, _ in os.walk(directory) if CLAIMS in names)


def remove_claims(directory: Path) -> None:
    """Forget all claims on the parts of an artifact, once it is committed. Several may do so at once.

    Those on the artifact itself go last, so that whoever is killed here leaves them to tell that something is
    left. What cannot be removed stays: it is in nobody's way.
    """
    remove_claims_below(directory)
    _remove_tree(directory / CLAIMS)


def remove_claims_below(directory: Path) -> None:
    """Forget those on what is made in folders of it: at once, for whoever looks. Several may do so at once.

    Whoever is killed here may leave some of them under a temporary name.
    """
    for place in claimed_places(directory):
        if place != directory:
            doomed = place / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
            with contextlib.suppress(OSError):
                os.rename(place / CLAIMS, doomed)
                _remove_tree(doomed)


def _remove_tree(doomed: Path) -> None:
    """Remove a directory in which a last file may still appear, and one that is open elsewhere may stay for a
    while under a name of NFS's own (.nfs...)."""
    for _ in range(REMOVALS):
        shutil.rmtree(doomed, ignore_errors=True)
        if not os.path.lexists(doomed):
            return
