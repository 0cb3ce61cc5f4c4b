"""The megatron engine against the transformers engine, at every kind of layout, over gloo."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gloo import run_ranks

from megatron_lopd.config import EngineConfig, ParallelConfig
from megatron_lopd.data.records import Score
from megatron_lopd.engines import ScoreRequest, open_engine
from tests.model_zoo import make_model_dir

VOCABULARY = 131
TOP_K = 5
# Two fp32 programs, in nats: up to 2e-5 seen in these models, whose logits are as large as 40.
CLOSE = 1e-4
LAYOUTS = {
    "tp2": ("qwen3", ParallelConfig(tensor=2, processes=2)),
    "pp2": ("qwen3", ParallelConfig(pipeline=2, processes=2)),
    "pp2 of two chunks": ("qwen3", ParallelConfig(pipeline=2, virtual_pipeline=2, processes=2)),
    "cp2": ("qwen3", ParallelConfig(context=2, processes=2)),
    "dp2": ("qwen3", ParallelConfig(processes=2)),
    "tp2 pp2": ("qwen3", ParallelConfig(tensor=2, pipeline=2, processes=4)),
    "ep2": ("qwen3_moe", ParallelConfig(expert=2, processes=2)),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for family in ("qwen3", "qwen3_moe"):
        make_model_dir(root / family, family, vocab_size=VOCABULARY)
    return root


def requests(count: int = 23) -> list[ScoreRequest]:
    """Random tokens, from 1 to 20 of prompt and 1 to 30 of response; every fourth response has one token."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        prompt, response = rng.integers(1, 21), 1 if number % 4 == 0 else rng.integers(1, 31)
        tokens = rng.integers(0, VOCABULARY, prompt + response, dtype=np.int32)
        made.append(ScoreRequest(f"s{number}", tokens[:prompt], tokens[prompt:]))
    return made


def assert_agree(scores: Sequence[Score], expected: Sequence[Score], close: float = CLOSE) -> None:
    assert [score.sample_id for score in scores] == [score.sample_id for score in expected]
    for score, other in zip(scores, expected, strict=True):
        np.testing.assert_allclose(score.log_probs, other.log_probs, rtol=0, atol=close)
        assert (score.top_k is None) == (other.top_k is None)
        if score.top_k is not None and other.top_k is not None:
            # Ids may swap where two tokens are as likely, to rounding: by the k-th largest, not by name.
            np.testing.assert_allclose(score.top_k.log_probs, other.top_k.log_probs, rtol=0, atol=close)
            assert (score.top_k.ids == other.top_k.ids).mean() > 0.99
            np.testing.assert_allclose(
                score.top_k.tail_log_probs, other.top_k.tail_log_probs, rtol=0, atol=close
            )


@pytest.fixture(scope="module")
def expected(models: Path) -> dict[str, list[Score]]:
    return {
        family: list(open_engine(EngineConfig(), str(models / family)).score(requests(), TOP_K))
        for family in ("qwen3", "qwen3_moe")
    }


def megatron(parallel: ParallelConfig | None = None, tokens: int = 96) -> EngineConfig:
    return EngineConfig("megatron", micro_batch_tokens=tokens, parallel=parallel)


def score_in_ranks(
    config: EngineConfig, model_dir: str, batches: Sequence[Sequence[ScoreRequest]]
) -> list[list[Score]] | None:
    """In each rank: rank 0 scores, twice over, the others serve."""
    from megatron_lopd.engines.megatron import leading, serve

    if os.environ["RANK"] != "0":
        serve()
        return None
    with leading():
        scores = []
        for _ in range(2):  # an engine can be opened again, as the agreement gate does
            with closing(open_engine(config, model_dir)) as engine:
                scores = [list(engine.score(batch, TOP_K)) for batch in batches]
    return scores


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_scores_as_transformers_does(
    models: Path, expected: dict[str, list[Score]], name: str
) -> None:
    family, parallel = LAYOUTS[name]
    asked = requests()
    batches = [asked[:1], asked[1:]]  # one request alone leaves ranks and micro-batches empty
    scores, *others = run_ranks(
        parallel.processes, score_in_ranks, megatron(parallel), str(models / family), batches
    )
    assert others == [None] * (parallel.processes - 1)
    assert_agree([*scores[0], *scores[1]], expected[family])


@pytest.mark.parametrize("tokens", [50, 4096])
def test_packing_does_not_show(models: Path, expected: dict[str, list[Score]], tokens: int) -> None:
    with closing(open_engine(megatron(tokens=tokens), str(models / "qwen3_moe"))) as engine:
        assert_agree(list(engine.score(requests(), TOP_K)), expected["qwen3_moe"])
        plain = list(engine.score(requests()))
    assert_agree(plain, [replace(score, top_k=None) for score in expected["qwen3_moe"]])
