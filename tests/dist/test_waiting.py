"""What takes long on one rank is waited for outside of collectives, and shared out where it can be."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import timedelta
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from gloo import RankError, run_ranks

from megatron_lopd.config import ParallelConfig
from megatron_lopd.runtime import environment, launch
from tests.training_zoo import make_root, train

DP2 = ParallelConfig(processes=2)
# Seconds. What other tests delay, beside this one, is less.
GROUPS_WAIT, HASHING_TAKES, MEETING_TAKES = 3.0, 5.0, 4.0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_root(tmp_path_factory.mktemp("job"))
    run_ranks(2, _train, root)
    return root


def test_hashing_is_shared_out_and_outlasts_the_groups_timeout(root: Path) -> None:
    found = run_ranks(2, _find_newest, root)
    steps, hashed = zip(*found, strict=True)
    assert steps == (2, 2)
    directory = root / "run" / "checkpoints" / "step_00000002"
    whole = {path.name for path in directory.iterdir()}
    assert set(hashed[0]) | set(hashed[1]) == whole - {"manifest.json"}
    assert not set(hashed[0]) & set(hashed[1])
    sizes = [sum((directory / name).stat().st_size for name in share) for share in hashed]
    assert max(sizes) < 0.65 * sum(sizes)


def test_a_damaged_file_of_any_share_is_the_same_error_in_all(root: Path) -> None:
    directory = root / "run" / "checkpoints" / "step_00000002"
    for name in ("__0_1.distcp", "__1_2.distcp"):
        content = bytearray((directory / name).read_bytes())
        content[100] ^= 1
        (directory / name).write_bytes(content)
        first, second = run_ranks(2, _verify, directory)
        assert first == second
        assert f"{name}: damaged" in first
        content[100] ^= 1
        (directory / name).write_bytes(content)


def test_rank_zero_may_work_for_longer_than_the_groups_wait(root: Path) -> None:
    assert run_ranks(2, _work_on_rank_zero) == ["done", "done"]


def test_a_collective_does_not_wait_for_longer() -> None:
    """Else the tests above would show nothing."""
    with pytest.raises(RankError, match=r"(?i)timed? ?out"):
        run_ranks(2, _late_for_a_collective)


MEETING = """
import pathlib, sys, time
from datetime import timedelta
from io import FileIO
from megatron_lopd.config import load_recipe
from megatron_lopd.mcore import process_groups
from megatron_lopd.pipeline.execute import execute
from megatron_lopd.pipeline.resolved import ResolvedRun
from megatron_lopd.pipeline.stage import Output, Plan, Stage
from megatron_lopd.training import consensus  # before the clock runs

process_groups.TIMEOUT = timedelta(seconds=float(sys.argv[1]))
here = pathlib.Path(sys.argv[2])
(here / sys.argv[3]).touch()
while len(list(here.iterdir())) < 2:  # imports take one rank longer than the other
    time.sleep(0.01)

class Slow(Stage):
    name, kind = "slow", "report"

    def check(self, run):
        return []

    def plan(self, run):
        time.sleep(2 * float(sys.argv[1]))  # models to hash
        return Plan({"seed": 3}, {}, "proved")

    def commit(self, run, plan):
        return Output([], {})

    def follow(self, run, plan):
        assert plan.config == {"seed": 3}

assert execute(Slow(), ResolvedRun(load_recipe(sys.argv[4])))
"""


def test_rank_zero_is_met_before_it_hashes(tmp_path: Path) -> None:
    """As `lopd run` starts ranks: rank 0 serves the store, and no agent of torchrun's does."""
    recipe, port = tmp_path / "recipe.yaml", launch._free_port()
    recipe.write_text(f"run_dir: {tmp_path}/run\nsft: {{steps: 1}}\n")
    (tmp_path / "here").mkdir()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", MEETING, str(MEETING_TAKES), str(tmp_path / "here"), str(rank), str(recipe)],
            env=environment.for_rank(rank, 2, port, os.environ),
        )
        for rank in range(2)
    ]
    try:
        assert [rank.wait(120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


# ---- in the ranks


def _train(root: Path) -> Any:
    return train(root, parallel=DP2, steps=2)


def _find_newest(root: Path) -> tuple[int, list[str]]:
    """The newest checkpoint's step, and the names of the files that this rank hashed, slowly on rank 0."""
    from megatron_lopd.artifacts import committed
    from megatron_lopd.families.architecture import read_architecture
    from megatron_lopd.files import digests
    from megatron_lopd.mcore.process_groups import model_parallel
    from megatron_lopd.training.checkpoints import Checkpoints
    from megatron_lopd.training.saving import newest_checkpoint

    hashed = []
    hash_file = committed._hash

    def slow(stream: FileIO, path: Path) -> str:
        hashed.append(path.name)
        if ranks.rank == 0:
            time.sleep(HASHING_TAKES)
        return hash_file(stream, path)

    committed._hash = slow
    architecture = read_architecture(root / "model")
    with model_parallel(DP2, seed=0, timeout=timedelta(seconds=GROUPS_WAIT)) as ranks:
        checkpoints = Checkpoints(root / "run" / "checkpoints", "a job", architecture, "proved", 2)
        newest = newest_checkpoint(checkpoints, lambda text: None)
    committed._hash = hash_file
    assert newest is not None
    return newest.progress.step, hashed


def _verify(directory: Path) -> str:
    from megatron_lopd.artifacts.manifest import load_manifest
    from megatron_lopd.errors import DataError
    from megatron_lopd.training.consensus import verify_together

    try:
        verify_together({directory: load_manifest(directory)})
    except DataError as error:
        return str(error)
    return "whole"


def _work_on_rank_zero() -> str:
    from megatron_lopd.mcore.process_groups import model_parallel
    from megatron_lopd.training.consensus import on_rank_zero

    def work() -> str:
        time.sleep(HASHING_TAKES)
        return "done"

    with model_parallel(DP2, seed=0, timeout=timedelta(seconds=GROUPS_WAIT)):
        return on_rank_zero(work)


def _late_for_a_collective() -> None:
    import torch

    from megatron_lopd.mcore.process_groups import model_parallel
    from megatron_lopd.training.consensus import any_rank

    with model_parallel(DP2, seed=0, timeout=timedelta(seconds=GROUPS_WAIT)) as ranks:
        if ranks.rank == 0:
            time.sleep(HASHING_TAKES)
        any_rank(False, torch.device("cpu"))
