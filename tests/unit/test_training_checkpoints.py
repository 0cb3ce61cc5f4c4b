"""Which checkpoints stay, and which one is found, whatever gets damaged on the way."""

from __future__ import annotations

import io
import os
import pickle
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3

from megatron_lopd.artifacts.committed import FileEntry
from megatron_lopd.artifacts.manifest import load_manifest, verify_files, write_manifest
from megatron_lopd.checkpoint.sharded import canonical_pickle
from megatron_lopd.errors import DataError
from megatron_lopd.families.architecture import Architecture, read_architecture
from megatron_lopd.training.checkpoints import Checkpoints, Progress
from megatron_lopd.training.saving import newest_checkpoint
from tests.model_zoo import make_config


@pytest.fixture
def architecture(tmp_path: Path) -> Architecture:
    make_config("qwen3").save_pretrained(tmp_path / "model")
    return read_architecture(tmp_path / "model")


def save(checkpoints: Checkpoints, step: int) -> Path:
    temporary = checkpoints.begin(step)
    weights = temporary / "weights"
    weights.write_bytes(bytes([step]) * 100)
    entries = {"weights": FileEntry(100, blake3(weights.read_bytes()).hexdigest())}
    checkpoints.commit(temporary, entries, Progress(step=step), {"world_size": 1})
    return checkpoints.directory / f"step_{step:08d}"


def is_whole(path: Path) -> bool:
    try:
        verify_files(path, load_manifest(path))
    except DataError:
        return False
    return True


def found_step(checkpoints: Checkpoints) -> int:
    found = newest_checkpoint(checkpoints, lambda text: None)
    return 0 if found is None else found.progress.step


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_whole_one_is_never_removed(tmp_path: Path, architecture: Architecture, keep: int) -> None:
    """A random life: saves, damage, and starting again from what is found."""
    rng = random.Random(keep)
    checkpoints = Checkpoints(tmp_path / "checkpoints", "a job", architecture, "proved", keep)
    step = 0
    for _ in range(50):
        event = rng.choice(["save", "save", "damage", "start again"])
        present = sorted((tmp_path / "checkpoints").glob("step_*"))
        if event == "save":
            step += rng.randint(1, 2)
            saved = save(checkpoints, step)
            assert is_whole(saved)
            assert found_step(checkpoints) == step
            kept = [path for path in checkpoints.directory.glob("step_*") if path.name <= saved.name]
            assert len(kept) <= keep
        elif event == "damage" and present:
            (rng.choice(present) / "weights").write_bytes(b"torn")
        else:
            whole = [int(path.name[5:]) for path in present if is_whole(path)]
            step = found_step(checkpoints)
            assert step == max(whole, default=0)


def test_a_damaged_newer_one_does_not_cost_the_one_justcanonical_pickle(
    tmp_path: Path, architecture: Architecture
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", "a job", architecture, "proved", keep=1)
    (save(checkpoints, 4) / "weights").unlink()
    assert found_step(checkpoints) == 0
    save(checkpoints, 2)
    assert found_step(checkpoints) == 2


def test_one_moved_elsewhere_and_linked_is_as_good_and_stays_there(
    tmp_path: Path, architecture: Architecture
) -> None:
    """To another disk, say. Once there are too many the link goes, and nothing that others linked to."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", "a job", architecture, "proved", keep=1)
    moved = save(checkpoints, 1).rename(tmp_path / "moved")
    (checkpoints.directory / "step_00000001").symlink_to(moved)
    (checkpoints.directory / "step_00000002").symlink_to(tmp_path / "nowhere")
    (checkpoints.directory / ".tmp-linked").symlink_to(moved)
    assert found_step(checkpoints) == 1
    save(checkpoints, 2)
    assert found_step(checkpoints) == 2
    assert [path.name for path in checkpoints.directory.iterdir()] == ["step_00000002"]
    assert is_whole(moved)


def test_names_are_strict_and_held_to_their_progress(tmp_path: Path, architecture: Architecture) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", "a job", architecture, "proved", keep=9)
    save(checkpoints, 1)
    names = [
        "step_300",
        "step_000000300",
        "step_00000300.bak",
        "step_0000030\u0663",
        "step_",
        "step_+0000300",
    ]
    for name in (*names, "step_" + "9" * 30, "STEP_00000300", "step_00000300\n"):
        shutil.copytree(checkpoints.directory / "step_00000001", checkpoints.directory / name)
    (checkpoints.directory / "step_00000400").write_text("a file")
    assert checkpoints.steps() == [1]
    shutil.copytree(save(checkpoints, 2), checkpoints.directory / "step_00000009")
    notes: list[str] = []
    found = newest_checkpoint(checkpoints, notes.append)
    assert found is not None
    assert found.progress.step == 2
    (note,) = notes
    assert "step_00000009: it is the checkpoint of step 2, under another's name" in note


@pytest.mark.parametrize(
    "change",
    [
        {"progress": {"step": 2, "samples": -1}},
        {"progress": {"step": 2, "tokens": "9"}},
        {"progress": {"step": 2, "more": 1}},
        {"progress": {"step": 2, "recent_drift": [1]}},
        {"progress": [], "layout": {}},
        {"layout": {"world_size": "1"}},
        {"layout": None},
        {"identity": 7},
        {"architecture": []},
    ],
)
def test_one_that_records_no_progress_is_passed_over(
    tmp_path: Path, architecture: Architecture, change: dict[str, Any]
) -> None:
    """Whoever changed it knew how to write a manifest."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", "a job", architecture, "proved", keep=9)
    save(checkpoints, 1)
    newest = save(checkpoints, 2)
    manifest = load_manifest(newest)
    write_manifest(newest, replace(manifest, config=manifest.config | change))
    notes: list[str] = []
    found = newest_checkpoint(checkpoints, notes.append)
    assert found is not None
    assert found.progress.step == 1
    (note,) = notes
    assert "records no progress of a job" in note


@pytest.mark.parametrize("odd", ["fifo", "directory", "link"])
def test_a_manifest_that_cannot_be_read_is_passed_over(
    tmp_path: Path, architecture: Architecture, odd: str
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", "a job", architecture, "proved", keep=9)
    save(checkpoints, 1)
    path = save(checkpoints, 2) / "manifest.json"
    path.unlink()
    {"fifo": os.mkfifo, "directory": os.mkdir, "link": lambda at: os.symlink("nowhere", at)}[odd](path)
    assert found_step(checkpoints) == 1


def test_what_others_put_beside_them_is_no_checkpoint_and_stays(
    tmp_path: Path, architecture: Architecture
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", "a job", architecture, "proved", keep=1)
    shutil.copytree(save(checkpoints, 1), checkpoints.directory / "step_00000001.bak")
    (checkpoints.directory / "step_00000001.tar").touch()
    assert checkpoints.steps() == [1]
    save(checkpoints, 2)
    assert found_step(checkpoints) == 2
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == [
        "step_00000001.bak",
        "step_00000001.tar",
        "step_00000002",
    ]


def test_equal_states_are_the_same_bytes_whether_or_not_they_share_objects() -> None:
    """What was loaded shares none of the objects that were shared when it was saved."""
    betas, name = (0.9, 0.98), "constant"
    shared: dict[str, Any] = {
        "groups": [{"betas": betas, "style": name}, {"betas": betas, "style": name}],
        "steps": (1, 2),
    }
    apart = pickle.loads(pickle.dumps(shared["groups"][:1])) + pickle.loads(
        pickle.dumps(shared["groups"][1:])
    )
    saved = canonical_pickle(shared)
    assert canonical_pickle({"groups": apart, "steps": (1, 2)}) == saved
    assert canonical_pickle({"groups": apart, "steps": (1.0, 2)}) != saved
    assert torch.load(io.BytesIO(saved), weights_only=True) == shared
