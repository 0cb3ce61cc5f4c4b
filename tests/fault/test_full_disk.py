"""A disk that fills up, stood in for by a limit on file size: one line, nothing half-committed, no loss."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline import write_recipe

# Bytes a file may have: too few for a shard of rollouts, and for a checkpoint but not a shard.
LIMITS = {"generate": 2_000, "sft": 60_000}


def run(root: Path, limit: int | None) -> subprocess.CompletedProcess[str]:
    def limit_file_size() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "megatron_lopd.cli", "run", "recipe.yaml"]
    return subprocess.run(
        command,
        cwd=root,
        preexec_fn=limit_file_size,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("stage", LIMITS)
def test_a_full_disk_is_one_line_and_nothing_half_committed(tmp_path: Path, stage: str) -> None:
    write_recipe(tmp_path)
    result = run(tmp_path, LIMITS[stage])
    assert result.returncode == 1
    (message,) = [line for line in result.stderr.splitlines() if line.startswith("lopd run:")]
    assert str(Path("run", stage)) in message
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run" / stage / "manifest.json").exists()
    assert run(tmp_path, None).returncode == 0
