"""A real pretrained model through everything that can get one wrong: conversion, log-probs, the engines.

SmolLM2-135M has 9 heads over 3 groups, so it splits into 3 tensor parallel ranks and not into 2.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gloo import run_ranks
from safetensors import safe_open

from megatron_lopd.config import AgreementConfig, EngineConfig, ParallelConfig, ScoreConfig
from megatron_lopd.convert.offline import hf_to_megatron, megatron_to_hf
from megatron_lopd.data.dataset import shard_name
from megatron_lopd.data.records import Rollout, Score
from megatron_lopd.data.schemas import ROLLOUTS
from megatron_lopd.engines import open_engine
from megatron_lopd.engines.megatron import MegatronOptions
from megatron_lopd.errors import NumericsError
from megatron_lopd.pipeline import engine_gate as agreement
from megatron_lopd.pipeline.engine_gate import AGREEMENT_FILE, check_agreement
from tests.shard_zoo import write_committed
from tests.smollm2 import TOP_K, assert_agree

LAYOUTS = {
    "TP3": ParallelConfig(tensor=3, processes=3),
    "PP2": ParallelConfig(pipeline=2, processes=2),
}


def digests(directory: Path) -> dict[str, str]:
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return {name: digest(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118  no mapping


def digest(tensor: torch.Tensor) -> str:
    values = tensor.contiguous().view(torch.uint8).numpy()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(values).hexdigest()}"


def test_there_and_back_again_through_a_checkpoint(smollm2: Path, tmp_path: Path) -> None:
    hf_to_megatron(smollm2, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", max_shard_bytes=10**10)
    assert digests(tmp_path / "hf") == digests(smollm2)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "hf" / name).read_bytes() == (smollm2 / name).read_bytes()


def test_one_rank_scores_as_transformers_does(
    smollm2: Path, smollm2_asked: list[Rollout], smollm2_scores: list[Score]
) -> None:
    with closing(open_engine(EngineConfig("megatron"), str(smollm2))) as engine:
        assert_agree(list(engine.score(smollm2_asked, TOP_K)), smollm2_scores)


@pytest.mark.parametrize("layout", ["TP3", pytest.param("PP2", marks=pytest.mark.nightly)])
def test_split_it_has_the_same_weights_and_scores(
    smollm2: Path, smollm2_asked: list[Rollout], smollm2_scores: list[Score], layout: str
) -> None:
    parallel = LAYOUTS[layout]
    config = EngineConfig("megatron", options=MegatronOptions(256, parallel))
    ranks = run_ranks(parallel.processes, split_in_ranks, config, str(smollm2), smollm2_asked, timeout=240)
    weights, scores = ranks[0]
    assert weights == digests(smollm2)
    assert_agree(scores, smollm2_scores)


def split_in_ranks(
    config: EngineConfig, smollm2: str, asked: list[Rollout]
) -> tuple[dict[str, str], list[Score]]:
    """The weights as every rank's parts make them up, and the scores; of rank 0."""
    from megatron_lopd.convert.gather import WeightGatherer
    from megatron_lopd.engines.megatron_engine import _opened, leading, serve

    with _opened(config, smollm2, np.array([], dtype=np.int64)) as model:
        # For an optimizer, which this would be the largest part of: the gatherer looks at its chunks alone.
        off = SimpleNamespace(overlap_param_gather=False)
        wrapped = [SimpleNamespace(module=chunk, ddp_config=off) for chunk in model._chunks]
        optimization: Any = SimpleNamespace(chunks=wrapped)
        gatherer = WeightGatherer(optimization, wrapped[0].module.arch)
        weights = {name: digest(values) for name, values in gatherer.weights()}
    if os.environ["RANK"] != "0":
        serve()
        return weights, []
    with leading(), closing(open_engine(config, smollm2)) as engine:
        return weights, list(engine.score(asked, TOP_K))


# ---- the agreement gate


@pytest.fixture
def rollouts(smollm2_asked: list[Rollout], tmp_path: Path) -> Path:
    (tmp_path / "rollout").mkdir()
    (tmp_path / "score").mkdir()
    write_committed(tmp_path / "rollout", shard_name(ROLLOUTS, 0), ROLLOUTS, smollm2_asked)
    return tmp_path / "rollout"


def gate(smollm2: Path, rollouts: Path, second: EngineConfig, **tolerances: float) -> dict[str, Any]:
    settings = AgreementConfig(engine=second, samples=4, **tolerances)
    scoring = ScoreConfig(engine=EngineConfig("megatron"), top_k=TOP_K)
    directory = rollouts.parent / "score"
    check_agreement(scoring, settings, smollm2, rollouts, directory, "made from this")
    found: dict[str, Any] = json.loads((directory / AGREEMENT_FILE).read_text())
    return found


def test_the_gate_lets_engines_through_that_agree(
    smollm2: Path, rollouts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bf16 = EngineConfig(dtype="bf16")
    found = gate(smollm2, rollouts, bf16)
    assert 0.001 < found["own"]["mean"] < 0.05  # what bf16 costs
    assert (found["samples"], found["tolerance"]["mean"]) == (4, 0.05)
    assert "agree on 4 rollouts" in capsys.readouterr().out
    monkeypatch.setattr(agreement, "open_engine", None)
    assert gate(smollm2, rollouts, bf16) == found  # which is not measured again
    with pytest.raises(TypeError):
        gate(smollm2, rollouts, bf16, mean=0.1)


def test_the_gate_refuses_another_precision_and_another_rope(
    smollm2: Path, rollouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NumericsError, match=r"refused: megatron \(fp32\) and transformers \(bf16\) disagree"):
        gate(smollm2, rollouts, EngineConfig(dtype="bf16"), mean=1e-3)

    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for path in smollm2.iterdir():
        (wrong / path.name).symlink_to(path)
    config = json.loads((smollm2 / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] *= 10
    (wrong / "config.json").unlink()
    (wrong / "config.json").write_text(json.dumps(config))
    # What an engine that misreads the model would do.
    monkeypatch.setattr(
        agreement,
        "open_engine",
        lambda engine, path: open_engine(engine, str(wrong) if engine.name == "transformers" else path),
    )
    with pytest.raises(NumericsError, match=r"RoPE scaling") as refused:
        gate(smollm2, rollouts, EngineConfig())
    assert refused.value.exit_code == 3
    assert "\n" not in str(refused.value)
    assert not (rollouts.parent / "score" / AGREEMENT_FILE).exists()
