"""A thousand single-byte flips in rollouts, scores and checkpoints: each found before it can reach the model.

By the path that training takes: the train stage up to where it would start, and the search for the newest
whole checkpoint. Size and times of a flipped file stay as they were, as bit rot leaves them.
"""

from __future__ import annotations

import os
import random
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

FLIPS = {"rollout": 300, "score": 300, "checkpoint": 400}


@contextmanager
def flipped(directory: Path, rng: random.Random) -> Iterator[Path]:
    """Another byte in one of an artifact's files, the manifest included; each as likely. Undone after."""
    path = directory / rng.choice([MANIFEST, *load_manifest(directory).files])
    before, whole = path.stat(), path.read_bytes()
    position = rng.randrange(len(whole))
    mask = rng.randrange(1, 256)
    for content in (whole[:position] + bytes([whole[position] ^ mask]) + whole[position + 1 :], whole):
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        if content is not whole:
            yield path


@pytest.mark.parametrize("stage", ["rollout", "score"])
def test_no_flip_in_what_is_trained_on_goes_unseen(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    root = shutil.copytree(finished, tmp_path / "copy")
    shutil.rmtree(root / "run/train")
    monkeypatch.chdir(root)
    run = ResolvedRun(load_recipe(Path("recipe.yaml"), []))
    rng = random.Random(0)
    seen = set()
    for number in range(FLIPS[stage]):
        with flipped(Path("run", stage), rng) as path:
            seen.add(path.name)
            with pytest.raises(DataError, match=str(path)):
                execute(TRAIN, run)
            assert not Path("run/train/checkpoints").exists(), f"flip {number}: training began"
    assert seen == {MANIFEST, *load_manifest(Path("run", stage)).files}, "every file had its flips"


def test_no_flip_in_a_checkpoint_goes_unseen(finished: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(finished / "run/train/checkpoints", tmp_path / "checkpoints")
    *_, earlier, newest = sorted(directory.iterdir())  # the drift guard kept more
    manifest = load_manifest(newest)
    architecture = read_architecture(finished / "run/sft/model")
    checkpoints = Checkpoints(directory, manifest.config["identity"], architecture, "proved", keep=2)
    rng = random.Random(0)
    seen = set()
    for _ in range(FLIPS["checkpoint"]):
        notes: list[str] = []
        with flipped(newest, rng) as path:
            seen.add(path.name)
            found = newest_checkpoint(checkpoints, notes.append)
        assert found is not None
        assert found.path == earlier
        (note,) = notes
        assert str(path) in note
    assert seen == {MANIFEST, *manifest.files}
    whole = newest_checkpoint(checkpoints, notes.append)
    assert whole is not None
    assert whole.path == newest
