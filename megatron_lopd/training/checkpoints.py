"""The checkpoints of a run: each a committed directory, the newest whole one found by its digests.

`step_00000050/` is written under a temporary name, its files listed with their digests in
manifest.json, flushed, and renamed. A kill at any moment leaves either the whole directory or a
temporary one that is swept away. Rank 0 alone changes anything here; saving.py brings the ranks together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_lopd.artifacts.committed import FileEntry
from megatron_lopd.artifacts.manifest import (
    MANIFEST,
    LineageStatus,
    Manifest,
    clear_temporaries,
    load_manifest,
    write_manifest,
)
from megatron_lopd.errors import CheckpointError, DataError, Unreadable
from megatron_lopd.families.architecture import Architecture
from megatron_lopd.files.reading import is_file, is_there, names_in
from megatron_lopd.files.writing import TEMPORARY_PREFIX, fsync_directory, remove

KIND = "checkpoint"


@dataclass(frozen=True)
class Progress:
    """How far a run is: steps done and what they consumed; `loss` is the last step's, None when it was
    not finite or none was run; `recent_drift` is what the guard judges next (guards.recent_drift). No clock
    is in it: the same run gives the same checkpoint, byte for byte."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    response_tokens: int = 0
    skipped_steps: int = 0
    loss: float | None = None
    recent_drift: Sequence[Mapping[str, float]] = ()


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint of this job: how far it had come, and the parallel sizes it was saved at."""

    path: Path
    progress: Progress
    layout: dict[str, int]


@dataclass(frozen=True)
class Present:
    """A directory that has a checkpoint's name, and its manifest, or what is wrong with that."""

    path: Path
    manifest: Manifest | DataError


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints below `directory` of the job `identity`; the newest `keep` stay."""

    directory: Path
    identity: str
    architecture: Architecture
    lineage: LineageStatus
    keep: int

    def present(self) -> list[Present]:
        """Those that are there, newest first, after sweeping away what a killed save left."""
        clear_temporaries(self.directory)
        return [Present(path, _manifest_of(path)) for path in self._newest_first()]

    @staticmethod
    def newest_whole(
        present: Sequence[Present],
        verify: Callable[[Path, Manifest], None],
        note: Callable[[str], None],
    ) -> tuple[Path, Manifest] | None:
        """The first of `present` that `verify` raises no DataError for; whose it is has not been looked at.

        A damaged one is passed over, with a line through `note`. Nothing is loaded, and nothing of the
        model need exist yet. Raises Unreadable where the system refuses to read one.
        """
        for each in present:
            try:
                if isinstance(each.manifest, DataError):
                    raise each.manifest
                _progress_of(each.path, each.manifest)
                verify(each.path, each.manifest)
            except Unreadable:  # it may be whole: going on from one before would cost the steps between
                raise
            except DataError as error:
                note(f"checkpoint passed over: {error}")
                continue
            return each.path, each.manifest
        return None

    def own(self, path: Path, manifest: Manifest) -> Checkpoint:
        """A whole checkpoint of this job. Raises CheckpointError when it is another model's or job's."""
        self._require_own(path, manifest.config)
        return Checkpoint(path, _progress_of(path, manifest), manifest.config["layout"])

    def steps(self) -> list[int]:
        """The steps of those that are there, whole or not, oldest first."""
        return sorted(map(_step_of, self._newest_first()))

    def begin(self, step: int) -> Path:
        """An empty directory, under a temporary name, to write the checkpoint at `step` into."""
        temporary = self.directory / f"{TEMPORARY_PREFIX}{checkpoint_name(step)}"
        remove(temporary)
        temporary.mkdir(parents=True)
        return temporary

    def commit(
        self, temporary: Path, files: dict[str, FileEntry], progress: Progress, layout: dict[str, int]
    ) -> None:
        """Give a wholly written checkpoint its name, and remove those that are too many.

        Those of later steps stay: resuming passed them over as damaged, and they must not count.
        """
        config = {
            "identity": self.identity,
            "architecture": asdict(self.architecture),
            "layout": layout,
            "progress": asdict(progress),
        }
        counts = {"step": progress.step}
        write_manifest(temporary, Manifest(KIND, files, config, counts, {}, {}, self.lineage))
        target = self.directory / checkpoint_name(progress.step)
        if is_there(target):  # a damaged one that resuming passed over
            _remove(target)
        os.rename(temporary, target)
        fsync_directory(self.directory)
        up_to_this = [path for path in self._newest_first() if _step_of(path) <= progress.step]
        for old in up_to_this[self.keep :]:
            _remove(old)

    def _newest_first(self) -> list[Path]:
        return checkpoints_in(self.directory)

    def _require_own(self, path: Path, config: dict[str, Any]) -> None:
        saved, ours = config["architecture"], asdict(self.architecture)
        differences = [
            f"{name} is {saved.get(name)} there and {ours.get(name)} here"
            for name in sorted(saved.keys() | ours.keys())
            if saved.get(name) != ours.get(name)
        ]
        if differences:
            raise CheckpointError(
                f"{path} is of another model: {', '.join(differences)}: train the model it was saved from, "
                f"or remove {self.directory} to start over"
            )
        found = config["identity"]
        if found != self.identity:
            raise CheckpointError(
                f"{path} is of another job ({found[:12]}; this one is {self.identity[:12]}): the weights it "
                "started from, the data or the recipe have changed: undo that, or remove "
                f"{self.directory} to start over"
            )


def checkpoints_in(directory: Path) -> list[Path]:
    """Those in a directory, whole or not, newest first; what has another name, or is a file, is none."""
    named = [directory / name for name in names_in(directory) if _is_name(name)]
    return sorted((path for path in named if not is_file(path)), key=_step_of, reverse=True)


def _manifest_of(path: Path) -> Manifest | DataError:
    try:
        return load_manifest(path, KIND)
    except DataError as error:
        return error


def _progress_of(path: Path, manifest: Manifest) -> Progress:
    """What a checkpoint records. DataError where that is none of a checkpoint, or not of its name's step."""
    config = manifest.config
    try:
        progress = Progress(**config["progress"])
        done = progress.step, progress.samples, progress.tokens, progress.response_tokens
        counts = [*done, progress.skipped_steps, *config["layout"].values()]
        whole = (
            all(type(count) is int and 0 <= count < 1 << 63 for count in counts)
            and isinstance(progress.loss, float | int | None)
            and all(isinstance(each, dict) for each in progress.recent_drift)
            and isinstance(config["identity"], str)
            and isinstance(config["architecture"], dict)
        )
    except (TypeError, KeyError, AttributeError, DataError):  # that of a manifest that lacks one
        whole = False
    if not whole:
        raise DataError(f"{path / MANIFEST}: damaged: it records no progress of a job: remove {path}")
    if checkpoint_name(progress.step) != path.name:
        raise DataError(
            f"{path}: it is the checkpoint of step {progress.step}, under another's name: remove or rename it"
        )
    return progress


def _is_name(name: str) -> bool:
    """Whether `checkpoint_name` gives it."""
    digits = name.removeprefix("step_")
    return digits.isascii() and digits.isdigit() and len(digits) < 20 and checkpoint_name(int(digits)) == name


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def checkpoint_name(step: int) -> str:
    """The directory of the checkpoint after `step` steps, below checkpoints/."""
    return f"step_{step:08d}"


def _remove(directory: Path) -> None:
    """Rename first: a kill midway must not leave half a checkpoint under its name."""
    doomed = directory.with_name(f"{TEMPORARY_PREFIX}removed-{directory.name}")
    remove(doomed)
    os.rename(directory, doomed)
    remove(doomed)
