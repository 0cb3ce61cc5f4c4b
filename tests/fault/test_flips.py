"""A flipped bit at the head, in the middle and at the tail of each file: found before it can reach the model.

The files of rollouts, scores and a checkpoint, by the path that training takes: the train stage up to where
it would start, and the search for the newest whole checkpoint. A flipped file's size and times stay as they
were, as bit rot leaves them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_lopd.artifacts.manifest import MANIFEST, load_manifest
from megatron_lopd.config import load_recipe
from megatron_lopd.errors import DataError
from megatron_lopd.families.architecture import read_architecture
from megatron_lopd.pipeline.execute import execute
from megatron_lopd.pipeline.resolved import ResolvedRun
from megatron_lopd.stages.table import TRAIN
from megatron_lopd.training.checkpoints import Checkpoints
from megatron_lopd.training.saving import newest_checkpoint


def places(directory: Path) -> Iterator[tuple[Path, int]]:
    """Of each of an artifact's files, the manifest included: a digest has no blind spots between these."""
    for name in (MANIFEST, *load_manifest(directory).files):
        path = directory / name
        size = path.stat().st_size
        for position in sorted({0, size // 2, size - 1}):
            yield path, position


@contextmanager
def flipped(path: Path, position: int) -> Iterator[None]:
    """With one bit of the byte at `position` turned over; undone after."""
    before, whole = path.stat(), path.read_bytes()
    for content in (whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :], whole):
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        if content is not whole:
            yield


@pytest.mark.parametrize("stage", ["rollout", "score"])
def test_no_flip_in_what_is_trained_on_goes_unseen(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    root = shutil.copytree(finished, tmp_path / "copy")
    shutil.rmtree(root / "run/train")
    monkeypatch.chdir(root)
    run = ResolvedRun(load_recipe(Path("recipe.yaml"), []))
    for path, position in list(places(Path("run", stage))):
        with flipped(path, position):
            with pytest.raises(DataError, match=str(path)):
                execute(TRAIN, run)
            assert not Path("run/train/checkpoints").exists(), f"{path} at {position}: training began"


def test_no_flip_in_a_checkpoint_goes_unseen(finished: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(finished / "run/train/checkpoints", tmp_path / "checkpoints")
    *_, earlier, newest = sorted(directory.iterdir())  # the drift guard kept more
    identity = load_manifest(newest).config["identity"]
    architecture = read_architecture(finished / "run/sft/model")
    checkpoints = Checkpoints(directory, identity, architecture, "proved", keep=2)
    for path, position in list(places(newest)):
        notes: list[str] = []
        with flipped(path, position):
            found = newest_checkpoint(checkpoints, notes.append)
        assert found is not None
        assert found.path == earlier
        (note,) = notes
        assert str(path) in note
    whole = newest_checkpoint(checkpoints, print)
    assert whole is not None
    assert whole.path == newest
