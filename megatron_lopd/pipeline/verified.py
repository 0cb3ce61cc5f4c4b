"""Hashing what a stage reads once on a machine, by the process that starts its workers there.

It leaves the stamps of what it has hashed in a file of its user's alone and names that in its workers'
environment. A worker hashes what has no stamp there, or another now; one that was started elsewhere has no
such file, and hashes all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

from megatron_lopd.artifacts.committed import CommittedFile, known_of, learn, verify
from megatron_lopd.artifacts.manifest import Manifest, committed_files
from megatron_lopd.errors import ConfigError, DataError
from megatron_lopd.files.reading import read_object

VERIFIED = "LOPD_VERIFIED"  # in a worker's environment: the file with the stamps


@contextmanager
def verified_for_workers(artifacts: Mapping[Path, Manifest], directory: Path) -> Iterator[None]:
    """Hash artifacts, and tell the processes that are started in this block. DataError for damage."""
    files = _files(artifacts)
    verify(files)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir: {directory} cannot be written: {error.strerror}") from None
    with NamedTemporaryFile("w", prefix="lopd-verified-", suffix=".json") as told:
        json.dump(known_of(files), told)
        told.flush()
        os.environ[VERIFIED] = told.name
        try:
            yield
        finally:
            del os.environ[VERIFIED]


def verify_unless_told(artifacts: Mapping[Path, Manifest]) -> None:
    """Hash what the process that started this one has not, or not as it is. DataError for damage."""
    if VERIFIED in os.environ:
        try:
            known = read_object(Path(os.environ[VERIFIED]), follow_links=False)
        except DataError:  # whoever started this process has ended
            known = {}
        learn({key: (tuple(stamp), digest) for key, (stamp, digest) in known.items()})
    verify(_files(artifacts))


def _files(artifacts: Mapping[Path, Manifest]) -> list[CommittedFile]:
    return [
        file for directory, manifest in artifacts.items() for file in committed_files(directory, manifest)
    ]
