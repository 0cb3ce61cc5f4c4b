"""What the end of a stage comes to where calls on files are late, and workers are killed, stopped and woken.

Claims go while other workers look at them: at its end each must find that all is done, and nothing left over.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_lopd.files.writing import TEMPORARY_PREFIX
from megatron_lopd.runtime.claim_files import CLAIMS, PARTS
from tests.fault import worker_ends as rounds_of_workers
from tests.shims.file_faults import ROOT, build, preloaded

ENDS = 8  # of a round


@pytest.mark.parametrize("rounds", [3, pytest.param(250, marks=pytest.mark.nightly)])
@pytest.mark.timeout(3600)
def test_no_worker_fails_at_its_end_however_late_calls_on_files_are(tmp_path: Path, rounds: int) -> None:
    """Up to 5 ms for each call, eight workers, a stage with no model in it."""
    counts = worker_ends(tmp_path, rounds, "--bare")
    assert counts == {"ends": ENDS * rounds}


@pytest.mark.parametrize("rounds", [2, pytest.param(50, marks=pytest.mark.nightly)])
@pytest.mark.timeout(3600)
def test_nothing_is_left_over_by_workers_that_are_killed_stopped_and_woken(
    tmp_path: Path, rounds: int
) -> None:
    counts = worker_ends(tmp_path, rounds, "--bare", "--disturb", "--latency-ms=2")
    assert counts["kills"] + counts["stops"] > 0
    assert "failed" not in counts


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_every_byte_is_the_same_by_workers_that_are_killed_stopped_and_woken(tmp_path: Path) -> None:
    """Rollouts, scores and grades; `worker_ends` holds each round to what one worker alone makes."""
    counts = worker_ends(tmp_path, 50, "--disturb", "--latency-ms=2")
    assert counts["kills"] + counts["stops"] > 50
    assert "failed" not in counts


def test_nothing_is_left_where_another_who_clears_up_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever folder is looked at next, it has just put the claims there under a temporary name."""
    alone = tmp_path / "alone"
    assert rounds_of_workers.make_bare(alone) == 0
    expected = rounds_of_workers.files(alone)
    scandir = os.scandir
    for last in itertools.count():
        stage = shutil.copytree(alone, tmp_path / str(last)) / "run" / rounds_of_workers.BARE
        for place in (stage, stage / "a"):
            (place / CLAIMS).mkdir()
            (place / CLAIMS / PARTS).write_text("{}")
        looks = 0

        def look(path: Any, last: int = last, place: Path = stage / "a") -> Any:
            nonlocal looks
            if looks == last and (place / CLAIMS).exists():
                (place / CLAIMS).rename(place / f"{TEMPORARY_PREFIX}of-another")
            looks += 1
            return scandir(path)

        with monkeypatch.context() as patched:
            patched.setattr(os, "scandir", look)
            assert rounds_of_workers.make_bare(tmp_path / str(last)) == 0
        assert rounds_of_workers.files(tmp_path / str(last)) == expected, last
        if looks <= last:
            break


def worker_ends(directory: Path, rounds: int, *options: str) -> dict[str, Any]:
    """What became of the workers of so many rounds."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.fault.worker_ends", directory, str(rounds), *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": _python_path()} | preloaded(build(directory)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    counts = json.loads(result.stdout.splitlines()[-1])
    assert isinstance(counts, dict)
    if "failed" in counts:
        pytest.fail(result.stdout[-4000:])
    return counts


def _python_path() -> str:
    return os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
