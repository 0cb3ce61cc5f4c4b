"""Memory that runs out in training: one line that names the rank, and an end that is not queued again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_lopd.cli import main
from megatron_lopd.data.dataset import open_shards
from megatron_lopd.data.schemas import ROLLOUTS
from megatron_lopd.engines.transformers_engine import TransformersEngine
from megatron_lopd.training import loop

NO_MACHINE_HAS = 1 << 60  # bytes


def of_a_gpu() -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    "fill",
    [
        lambda: torch.empty(NO_MACHINE_HAS, dtype=torch.uint8),
        lambda: np.empty(NO_MACHINE_HAS, dtype=np.uint8),
        of_a_gpu,
    ],
)
def test_it_is_one_line_and_no_crash(
    finished: Path,
    fill: Callable[[], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(finished, root)
    shutil.rmtree(root / "run/train")
    monkeypatch.chdir(root)
    monkeypatch.setenv("LOPD_EXIT_FILE", str(tmp_path / "exit"))
    monkeypatch.setattr(loop, "run_micro_batches", lambda *arguments, **options: fill())
    assert main(["train", "recipe.yaml"]) == 1
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("lopd train")]
    assert "train: memory ran out on rank 0, whose device is cpu (" in line
    assert "lower train.micro_batch_tokens=96, set parallel.recompute=full, or split the model" in line
    # What lib.sh reads: only 75 and EngineDied, and an end that noted nothing, are queued again.
    assert (tmp_path / "exit").read_text() == "1 OutOfMemory\n"

    # The advice is taken: the directory that was begun goes on.
    monkeypatch.undo()
    monkeypatch.chdir(root)
    assert main(["train", "recipe.yaml", "train.micro_batch_tokens=64"]) == 0


def test_a_stage_that_ran_out_goes_on_with_a_smaller_batch(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(finished, root)
    before = list(open_shards(ROLLOUTS, root / "run/rollout"))
    shutil.rmtree(root / "run/rollout")
    monkeypatch.chdir(root)
    batches = TransformersEngine._generate_batch

    def published() -> dict[Path, int]:
        shards = (root / "run/rollout").glob("rollouts-*.arrow")
        return {path: path.stat().st_mtime_ns for path in shards}

    def fills_up(self: TransformersEngine, requests: Any, *rest: Any) -> Any:
        if published() and len(requests) > 8:  # one shard is made, whichever the worker began with
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return batches(self, requests, *rest)

    monkeypatch.setattr(TransformersEngine, "_generate_batch", fills_up)
    assert main(["rollout", "recipe.yaml"]) == 1
    assert "lower engine.batch_size" in capsys.readouterr().err
    kept = published()
    assert kept
    assert main(["rollout", "recipe.yaml", "rollout.engine.batch_size=8"]) == 0
    assert kept.items() <= published().items()  # what was made is not made again
    for one, other in zip(before, open_shards(ROLLOUTS, root / "run/rollout"), strict=True):
        assert one.sample_id == other.sample_id
        np.testing.assert_array_equal(one.response_tokens, other.response_tokens)
        # Matrix products of other shapes may sum in another order: a few roundings of logits below 20.
        np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=0, atol=2e-5)


def test_a_file_that_cannot_be_written_is_one_line(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(finished, root)
    shutil.rmtree(root / "run/train")
    monkeypatch.chdir(root)

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device", "run/train/metrics.jsonl")

    monkeypatch.setattr(loop.Reporter, "step", full)
    assert main(["train", "recipe.yaml"]) == 1
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("lopd train")]
    assert "run/train/metrics.jsonl: No space left on device: check the disk" in line
