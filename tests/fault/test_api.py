"""The Python interface makes what the commands make, and reads it back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import megatron_lopd as lopd
from megatron_lopd.artifacts.manifest import load_manifest
from megatron_lopd.data.dataset import open_scores, open_shards
from megatron_lopd.data.schemas import ROLLOUTS
from megatron_lopd.errors import ConfigError, DataError


@pytest.fixture
def root(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished run's models and recipe, and what the commands made of them in `commands`."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "run").rename(copy / "commands")
    monkeypatch.chdir(copy)
    return copy


def test_a_run_from_python_is_the_same_bytes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = lopd.Run("recipe.yaml")
    assert run.status()[0].split() == ["generate", "to", "do"]
    with pytest.raises(DataError, match="run the stage that makes it"):
        run.score()
    assert run.generate() == Path("run/generate")
    run.sft()
    run.run()
    for stage in ("generate", "sft", "rollout", "score", "train", "export", "evaluate"):
        assert load_manifest(root / "run" / stage) == load_manifest(root / "commands" / stage), stage
    assert all("committed" in line for line in run.status()[:7])
    capsys.readouterr()
    run.run()
    assert "nothing to do" in capsys.readouterr().out


def test_what_was_made_is_read_as_arrays(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    run = lopd.Run("recipe.yaml")
    records, scored = list(open_shards(ROLLOUTS, Path("run/rollout"))), list(open_scores(Path("run/score")))
    assert len(run.rollouts) == len(records) == 40
    assert run.rollouts[-1].sample_id == records[-1].sample_id
    assert [each.sample_id for each in run.scores[1:3]] == [each.sample_id for each in scored[1:3]]
    of_last = run.scores.of(records[-1].sample_id)
    np.testing.assert_array_equal(of_last.log_probs, scored[-1].log_probs)

    rollouts, scores = lopd.read_rollouts("run/rollout"), lopd.read_scores("run/score")
    assert rollouts.log_probs is not None
    assert scores.top_k_ids is None
    for index, (record, score) in enumerate(zip(records, scored, strict=True)):
        assert rollouts.ids[index] == scores.ids[index] == record.sample_id
        assert rollouts.finish_reasons[index] == record.finish_reason
        prompt = slice(*rollouts.prompt_offsets[index : index + 2])
        response = slice(*rollouts.response_offsets[index : index + 2])
        assert response == slice(*scores.offsets[index : index + 2])
        np.testing.assert_array_equal(rollouts.prompt_tokens[prompt], record.prompt_tokens)
        np.testing.assert_array_equal(rollouts.response_tokens[response], record.response_tokens)
        np.testing.assert_array_equal(rollouts.log_probs[response], record.log_probs)
        np.testing.assert_array_equal(scores.log_probs[response], score.log_probs)
    shard = lopd.read_rollouts("run/rollout/rollouts-00001.arrow")
    np.testing.assert_array_equal(shard.ids, rollouts.ids[16 : 16 + len(shard.ids)])
    assert list(lopd.read_scores("run/score/scores-00001.arrow").ids) == list(shard.ids)

    rows = [json.loads(line) for line in Path("run/train/metrics.jsonl").read_text().splitlines()]
    metrics = run.metrics("train")
    assert metrics["loss"].tolist() == [row["loss"] for row in rows]
    assert metrics["step"].tolist() == [1, 2, 3, 4, 5]


def test_overrides_are_those_of_the_commands(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)
    run = lopd.Run("recipe.yaml", {"train.steps": 3, "train.optimizer.lr": 1e-7}, seed=9, run_dir=Path("new"))
    assert run.recipe.train is not None
    assert (run.recipe.train.steps, run.recipe.train.optimizer.lr, run.recipe.seed) == (3, 1e-7, 9)
    assert run.directory == Path("new")
    with pytest.raises(ConfigError, match=r"did you mean train\.steps"):
        lopd.Run("recipe.yaml", {"train.stepz": 3})
