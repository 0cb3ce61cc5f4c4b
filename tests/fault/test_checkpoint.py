"""Checkpoints under kills, flipped bytes, a full disk and another job's hands."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import random
import resource
import shutil
import signal
import time
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from gloo import RankError, run_ranks

from tests.training_zoo import make_root, read_steps, train

# Every step saves, so that most kills land in a save.
OPTIONS: dict[str, Any] = {"steps": 12, "checkpoint_every": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> Any:
    (result,) = run_ranks(1, _train, root, {"work": "undisturbed", **OPTIONS})
    return result


def test_killed_at_any_moment_it_ends_bit_identical(root: Path, undisturbed: Any) -> None:
    """Kills at seeded random moments after the first checkpoint, until one attempt gets through."""
    rng = random.Random(0)
    work = root / "killed"
    context = mp.get_context("forkserver")
    kills = 0
    for _ in range(6):
        process = context.Process(target=_train, args=(root, {"work": work.name, **OPTIONS}))
        process.start()
        begun = _newest(work)
        while process.is_alive() and _newest(work) <= begun:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.15))
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGKILL)
            kills += 1
        process.join()
    assert kills >= 3, "the run ended before it was killed often enough: make it longer"
    ((progress, steps, weights),) = run_ranks(1, _train, root, {"work": work.name, **OPTIONS})
    reference, expected_steps, expected_weights = undisturbed
    assert steps == expected_steps, "each step once, to the last bit"
    assert weights == expected_weights
    assert (progress.step, progress.tokens) == (reference.step, reference.tokens)
    assert sorted(path.name for path in (work / "checkpoints").iterdir()) == [
        "step_00000011",
        "step_00000012",
    ]


def _newest(work: Path) -> int:
    return max((int(path.name[5:]) for path in (work / "checkpoints").glob("step_*")), default=0)


@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "missing file", "torn manifest"])
def test_a_damaged_checkpoint_is_passed_over(root: Path, undisturbed: Any, damage: str) -> None:
    work = root / damage.replace(" ", "-")
    shutil.copytree(root / "undisturbed", work)
    newest = work / "checkpoints" / "step_00000012"
    tensors = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    if damage == "flipped byte":
        content = bytearray(tensors.read_bytes())
        content[len(content) // 2] ^= 1
        tensors.write_bytes(content)
    elif damage == "truncated":
        os.truncate(tensors, tensors.stat().st_size // 2)
    elif damage == "missing file":
        (newest / "common.pt").unlink()
    else:
        (newest / "manifest.json").write_text("{")

    (((_, steps, weights), said),) = run_ranks(1, _train_and_listen, root, {"work": work.name, **OPTIONS})
    assert (steps, weights) == undisturbed[1:]
    assert "checkpoint passed over" in said
    assert "resumed after step 11 of 12" in said


def test_another_jobs_checkpoint_is_refused(root: Path, undisturbed: Any) -> None:
    with pytest.raises(
        RankError, match=r"CheckpointError: .*step_00000012 is of another job \(a job; this one is"
    ):
        run_ranks(1, _train, root, {"work": "undisturbed", "identity": "another", **OPTIONS})
    assert read_steps(root / "undisturbed") == undisturbed[1], "nothing was touched"


def test_a_full_disk_is_one_line_and_leaves_the_checkpoints_whole(root: Path) -> None:
    options = {"work": "full", "steps": 4, "checkpoint_every": 2}
    with pytest.raises(RankError, match=r"(CheckpointError|DataError): .*cannot be written"):
        run_ranks(1, _train_on_a_full_disk, root, options)
    assert list((root / "full" / "checkpoints").glob("step_*")) == []
    ((progress, steps, _),) = run_ranks(1, _train, root, options)
    assert progress.step == len(steps) == 4
    assert list((root / "full" / "checkpoints").glob(".*")) == [], "what the failure left was swept away"


def test_a_torn_metrics_line_is_dropped(root: Path, undisturbed: Any) -> None:
    work = root / "torn"
    shutil.copytree(root / "undisturbed", work)
    lines = (work / "metrics.jsonl").read_text().splitlines(keepends=True)
    ahead = json.loads(lines[-1]) | {"step": 13}
    (work / "metrics.jsonl").write_text("".join(lines) + json.dumps(ahead) + '\n{"step": 2')
    ((_, steps, _),) = run_ranks(1, _train, root, {"work": work.name, **OPTIONS})
    assert steps == undisturbed[1]


def _train(root: Path, options: dict[str, Any]) -> Any:
    return train(root, **options)


def _train_and_listen(root: Path, options: dict[str, Any]) -> Any:
    with redirect_stderr(StringIO()) as heard:
        return train(root, **options), heard.getvalue()


def _train_on_a_full_disk(root: Path, options: dict[str, Any]) -> Any:
    """No file may grow past 64 KiB, which the metrics stay below and the checkpoints do not."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
    return train(root, **options)
