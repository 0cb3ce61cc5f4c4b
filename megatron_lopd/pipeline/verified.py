"""Re-hashing what a stage reads once on a machine, by the process that starts its workers there.

It leaves the stamps of what it has hashed in a file and names that in its workers' environment. A worker
hashes what has no stamp there, or another now; one that was started elsewhere has no such file, and hashes
all.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from megatron_lopd.artifacts.digest_cache import stamp
from megatron_lopd.artifacts.manifest import CommittedFile, Manifest, committed_files, verify
from megatron_lopd.errors import ConfigError, DataError
from megatron_lopd.files.reading import read_json
from megatron_lopd.files.writing import TEMPORARY_PREFIX, atomic_write_json

VERIFIED = "LOPD_VERIFIED"  # in a worker's environment: the file with the stamps


@contextmanager
def verified_for_workers(artifacts: Mapping[Path, Manifest], directory: Path) -> Iterator[None]:
    """Re-hash artifacts, and tell the processes that are started in this block. DataError for damage."""
    files = _files(artifacts)
    stamps = {str(file.path.absolute()): stamp(file.path) for file in files if file.path.is_file()}
    verify(files)
    path = directory.absolute() / f"{TEMPORARY_PREFIX}verified-{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir: {directory} cannot be written: {error.strerror}") from None
    atomic_write_json(path, stamps)
    os.environ[VERIFIED] = str(path)
    try:
        yield
    finally:
        del os.environ[VERIFIED]
        path.unlink(missing_ok=True)


def verify_unless_told(artifacts: Mapping[Path, Manifest]) -> None:
    """Re-hash what the process that started this one has not, or not as it is. DataError for damage."""
    told: dict[str, list[int]] = {}
    if VERIFIED in os.environ:
        try:
            told = read_json(Path(os.environ[VERIFIED]))
        except DataError:  # cleared away by who has committed
            told = {}
    files = _files(artifacts)
    for file in files:
        file.check_size()
    verify([file for file in files if told.get(str(file.path.absolute())) != stamp(file.path)])


def _files(artifacts: Mapping[Path, Manifest]) -> list[CommittedFile]:
    return [
        file for directory, manifest in artifacts.items() for file in committed_files(directory, manifest)
    ]
