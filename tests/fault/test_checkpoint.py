"""Checkpoints under kills, flipped bytes, a full disk and another job's hands."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import pickle
import random
import re
import resource
import shutil
import signal
import time
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import RankError, run_ranks

from megatron_lopd.artifacts.committed import seal
from megatron_lopd.artifacts.manifest import load_manifest, write_manifest
from megatron_lopd.config import GuardConfig, ParallelConfig
from megatron_lopd.errors import CheckpointError
from tests.training_zoo import make_root, read_steps, train

# Every step saves, so that most kills land in a save.
# Without the drift guard, which would keep a checkpoint from before its window.
OPTIONS: dict[str, Any] = {"steps": 12, "checkpoint_every": 1, "guard": GuardConfig(min_kept_mass=None)}


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


@pytest.mark.parametrize("name", ["common.pt", ".metadata"])
def test_a_bomb_in_anothers_checkpoint_does_not_go_off(root: Path, undisturbed: Any, name: str) -> None:
    """Whoever planted it wrote the manifest anew: every digest is right."""
    work, exploded = root / f"planted-{name}", root / "exploded"
    shutil.copytree(root / "undisturbed", work)
    for checkpoint in (work / "checkpoints").iterdir():
        torch.save({"optimizer": Bomb(exploded)}, checkpoint / "common.pt")
        if name == ".metadata":
            (checkpoint / name).write_bytes(pickle.dumps(Bomb(exploded)))
        manifest = load_manifest(checkpoint)
        write_manifest(checkpoint, replace(manifest, files=seal(checkpoint, sorted(manifest.files))))
    with pytest.raises(RankError, match=rf"DataError: .*{re.escape(name)}: "):
        run_ranks(1, _train, root, {"work": work.name, **OPTIONS})
    assert not exploded.exists()


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_another_jobs_checkpoint_is_refused(root: Path, undisturbed: Any) -> None:
    with pytest.raises(
        RankError, match=r"CheckpointError: .*step_00000012 is of another job \(a job; this one is"
    ):
        run_ranks(1, _train, root, {"work": "undisturbed", "identity": "another", **OPTIONS})
    assert read_steps(root / "undisturbed") == undisturbed[1], "nothing was touched"


def test_a_full_disk_is_one_line_and_leaves_the_checkpoints_whole(root: Path) -> None:
    options = {"work": "full", "steps": 4, "checkpoint_every": 2}
    with pytest.raises(
        RankError, match=r"CheckpointError: .*cannot be written \(\[Errno 27\] File too large\)"
    ):
        run_ranks(1, _train_on_a_full_disk, root, options)
    assert list((root / "full" / "checkpoints").iterdir()) == [], "a full disk needs the room"
    ((progress, steps, _),) = run_ranks(1, _train, root, options)
    assert progress.step == len(steps) == 4


def test_a_full_disk_of_one_rank_is_the_same_line_in_all(root: Path) -> None:
    """Rank 1 alone has no room. It writes its part in a thread, while both go on."""
    options = {"work": "full-1", "parallel": ParallelConfig(tensor=2, processes=2)}
    first, second = run_ranks(2, _train_with_one_full_disk, root, options)
    assert first == second
    assert "CheckpointError" in first
    assert "full-1/checkpoints/.tmp-step_00000002: the checkpoint cannot be written" in first
    assert list((root / "full-1" / "checkpoints").iterdir()) == []


def test_steps_go_on_while_a_checkpoint_is_written_and_leave_no_trace_in_it(root: Path) -> None:
    """Writing waits here until the step after it is done: a save in the step's way would never end."""
    options = {"steps": 5, "checkpoint_every": 2, "keep_checkpoints": 9}
    ((progress, steps, _),) = run_ranks(1, _train, root, {"work": "prompt", **options})
    ((_, late_steps, _),) = run_ranks(1, _train_with_late_writes, root, {"work": "late", **options})
    assert late_steps == steps
    assert progress.step == 5
    prompt, late = (files_of(root / work / "checkpoints") for work in ("prompt", "late"))
    assert sorted({name.parts[0] for name in prompt}) == ["step_00000002", "step_00000004", "step_00000005"]
    assert prompt == late, "the same bytes"


def test_a_guard_that_stops_the_run_waits_for_the_checkpoint(root: Path) -> None:
    options = {"work": "guarded", "steps": 5, "checkpoint_every": 2, "max_skipped_steps": 0}
    with pytest.raises(RankError, match="NumericsError: step 3"):
        run_ranks(1, _train_into_a_guard, root, options)
    assert [path.name for path in (root / "guarded" / "checkpoints").iterdir()] == ["step_00000002"]


def files_of(directory: Path) -> dict[Path, bytes]:
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


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


def _train_with_one_full_disk(root: Path, options: dict[str, Any]) -> str:
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        train(root, **options)
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return "finished"


def _train_with_late_writes(root: Path, options: dict[str, Any]) -> Any:
    """The checkpoint of a step is written once the next step is in the metrics; the last has none."""
    from megatron_lopd.checkpoint.sharded import StagedState

    write = StagedState.write
    metrics = root / options["work"] / "metrics.jsonl"

    def late(staged: StagedState) -> Any:
        step = int(staged.directory.name[-8:])
        deadline = time.monotonic() + 30
        while len(metrics.read_text().splitlines()) < min(step + 1, options["steps"]):
            assert time.monotonic() < deadline, f"step {step + 1} waits for the checkpoint of step {step}"
            time.sleep(0.01)
        return write(staged)

    StagedState.write = late  # type: ignore[method-assign]
    return train(root, **options)


def _train_into_a_guard(root: Path, options: dict[str, Any]) -> Any:
    """The third step's gradients are not finite, and the checkpoint of the second is slow to write."""
    from megatron_lopd.checkpoint.sharded import StagedState
    from megatron_lopd.training import loop

    write = StagedState.write
    step, done = loop.guarded_step, []

    def slow(staged: StagedState) -> Any:
        time.sleep(0.5)
        return write(staged)

    def failing(optimization: Any) -> tuple[float, bool]:
        done.append(1)
        norm, applied = step(optimization)
        return (float("nan"), False) if len(done) == 3 else (norm, applied)

    StagedState.write, loop.guarded_step = slow, failing  # type: ignore[method-assign]
    return train(root, **options)
