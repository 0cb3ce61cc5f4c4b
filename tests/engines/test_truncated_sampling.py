"""Rollouts drawn by temperature, top-p and top-k: what is trained on them is held to pi_ref itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_lopd.cli import main
from megatron_lopd.data.dataset import open_shards
from megatron_lopd.data.schemas import ROLLOUTS
from tests.pipeline import write_recipe

SAMPLING = {"max_new_tokens": 12, "temperature": 0.6, "top_p": 0.95, "top_k": 20}


def test_a_student_that_has_not_moved_keeps_all_its_mass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = {"batch_size": 16, "shard_samples": 16}
    recipe = write_recipe(tmp_path, rollout={"sampling": SAMPLING, "engine": engine})
    monkeypatch.chdir(tmp_path)
    # A guard that looks at every step, and a student that hardly moves.
    options = ["prompts.eval=null", "train.guard.window=1", "train.steps=2", "train.optimizer.lr=1e-6"]
    assert main(["run", recipe.name, *options]) == 0, capfd.readouterr().err
    assert "rollouts agree with the trainer within" in capfd.readouterr().err

    rollouts = list(open_shards(ROLLOUTS, Path("run/rollout")))
    # What they were drawn from is far from pi_ref: the guard would have stopped the run.
    ratio = [np.exp(each.behaviour_log_probs - each.log_probs) for each in rollouts]
    assert np.concatenate(ratio).mean() < 0.9
    first = json.loads(Path("run/train/metrics.jsonl").read_text().splitlines()[0])
    # fp32 against fp32, over tokens whose log-probs are above -10.
    assert first["kept_mass"] == pytest.approx(1, abs=1e-4)
    assert first["effective_sample_size"] == pytest.approx(1, abs=1e-4)
    assert first["drift_kl"] == pytest.approx(0, abs=1e-7)
