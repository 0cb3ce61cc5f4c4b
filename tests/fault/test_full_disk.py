"""A disk that fills up, stood in for by a limit on file size: one line, nothing half-committed, no loss."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.forks import Command
from tests.pipeline import write_recipe

# Bytes a file may have: too few for a shard of rollouts, and for a checkpoint but not a shard.
LIMITS = {"generate": 2_000, "sft": 60_000}
SECONDS = 120.0  # this bounds a hang


@pytest.mark.parametrize("stage", LIMITS)
def test_a_full_disk_is_one_line_and_nothing_half_committed(tmp_path: Path, stage: str) -> None:
    write_recipe(tmp_path)
    command = ["run", "recipe.yaml"]
    assert Command(tmp_path, command, file_bytes=LIMITS[stage]).wait(SECONDS) == 1
    said = (tmp_path / "log").read_text()
    (message,) = [line for line in said.splitlines() if line.startswith("lopd run:")]
    assert str(Path("run", stage)) in message
    assert "Traceback" not in said
    assert not (tmp_path / "run" / stage / "manifest.json").exists()
    assert Command(tmp_path, command).wait(SECONDS) == 0
