"""`lopd score` with score.top_k, from rollouts to a committed artifact, against the teacher in float64."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_lopd.artifacts.manifest import load_manifest
from megatron_lopd.cli import main
from megatron_lopd.data.dataset import TrainingData
from megatron_lopd.errors import DataError
from megatron_lopd.families.architecture import read_architecture
from tests.pipeline import write_recipe
from tools import inspect_shard, verify

TOP_K = 4
OVERRIDES = ["score.top_k=4", "train.objective=topk_reverse_kl", "prompts.opd.count=20", "sft.steps=1"]


def test_top_k_scores_from_rollouts_to_the_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path).name
    monkeypatch.chdir(tmp_path)
    vocabulary = read_architecture("teacher").vocab_size
    assert main(["score", recipe, f"score.top_k={vocabulary - 1}", "run_dir=other"]) == 2
    assert f"lower it to at most {vocabulary - 2}" in capsys.readouterr().err
    for stage in ("generate", "sft", "rollout", "score"):
        assert main([stage, recipe, *OVERRIDES]) == 0
    assert load_manifest(Path("run/score")).config["top_k"] == TOP_K

    teacher = AutoModelForCausalLM.from_pretrained(
        "teacher", dtype=torch.float64, attn_implementation="eager"
    )
    data = TrainingData(Path("run/rollout"), Path("run/score"))
    for index in range(len(data)):
        sample = data.sample(index)
        prompt, response = sample.rollout.prompt_tokens, sample.rollout.response_tokens
        with torch.no_grad():
            logits = teacher(torch.from_numpy(np.concatenate([prompt, response]))[None].long()).logits[0]
        rows = logits[len(prompt) - 1 : -1].log_softmax(-1).numpy()  # [T, V]
        assert sample.score is not None
        top = sample.score.top_k
        assert top is not None
        np.testing.assert_array_equal(top.ids, np.argsort(-rows, axis=-1)[:, :TOP_K])
        own = np.take_along_axis(rows, response[:, None].astype(np.int64), axis=-1)[:, 0]
        kept = np.take_along_axis(rows, top.ids.astype(np.int64), axis=-1)
        left = rows.copy()
        np.put_along_axis(left, top.ids.astype(np.int64), -np.inf, axis=-1)
        np.put_along_axis(left, response[:, None].astype(np.int64), -np.inf, axis=-1)
        # fp32 logits of a tiny model; the top k is also kept in 16 bits, within the bound of columns.py.
        np.testing.assert_allclose(sample.score.log_probs, own, rtol=0, atol=1e-5)
        np.testing.assert_allclose(top.tail_log_probs, np.logaddexp.reduce(left, axis=-1), rtol=0, atol=1e-5)
        assert (np.abs(top.log_probs - kept) <= 1e-5 + 8.9e-5 * (0.1 - kept)).all()
    data.require_vocabulary(vocabulary)
    with pytest.raises(DataError, match=r"\.arrow: sample .* beyond the model's vocabulary of 3"):
        data.require_vocabulary(3)
    shown(monkeypatch, capsys)
    # Trained from, by two ranks that share every sequence; and on to the report.
    split = ["parallel.context=2", "parallel.processes=2"]
    assert main(["run", recipe, *OVERRIDES, *split]) == 0
    steps = [json.loads(line) for line in Path("run/train/metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["reverse_kl_top_k"] < steps[0]["reverse_kl_top_k"]
    assert Path("run/report/summary.json").is_file()


def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The two tools on that run, and what they say of bad arguments."""

    def run(tool: object, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["tool", *arguments])
        code = tool.main()  # type: ignore[attr-defined]
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    data = TrainingData(Path("run/rollout"), Path("run/score"))
    sample, score = data.sample(5), data.sample(5).score
    assert score is not None
    assert score.top_k is not None
    sample_id = sample.rollout.sample_id
    last = len(score.log_probs) - 1
    shard = "run/score/scores-00000.arrow"
    code, text = run(inspect_shard, shard, "--sample", sample_id, "--token", str(last))
    assert code == 0
    likeliest, tail = int(score.top_k.ids[last, 0]), score.top_k.tail_log_probs[last]
    for expected in (
        "16 scores, version 3, top_k 4",
        sample_id,
        f"response token {last}: log-prob {score.log_probs[last]:.4f} nats, tail {tail:.4f}",
        f"      {likeliest} '",
    ):
        assert expected in text
    code, text = run(inspect_shard, shard, "--sample", sample_id, "--token", str(last + 1))
    assert (code, text.splitlines()[-1].endswith(f"from 0 to {last}, not {last + 1}")) == (1, True)
    code, text = run(inspect_shard, shard, "--sample", "nobody")
    assert (code, "sample nobody is not among these 16 scores" in text) == (1, True)
    code, text = run(verify, "run/score")
    assert (code, "intact" in text) == (0, True)
    code, text = run(verify, "teacher")
    assert (code, "nothing here is committed" in text) == (1, True)
