"""The megatron engine against the transformers engine, at every kind of layout, over gloo."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gloo import run_ranks
from safetensors.torch import load_file, save_file

from megatron_lopd.artifacts.manifest import load_manifest
from megatron_lopd.cli import main
from megatron_lopd.config import EngineConfig, ParallelConfig, Sampling
from megatron_lopd.data.dataset import open_scores
from megatron_lopd.data.records import Rollout, Score
from megatron_lopd.engines import open_engine
from megatron_lopd.errors import DataError, EngineError
from tests.model_zoo import make_model_dir, unsampled
from tests.pipeline import write_recipe

VOCABULARY = 131
TOP_K = 5
# Two fp32 programs, in nats: up to 2e-5 seen in these models, whose logits are as large as 40.
CLOSE = 1e-4
# Of top-k log-probs that went through a shard, where they are kept in 16 bits: a step is 5e-4 at -3 nats.
KEPT = 1e-3
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


def requests(count: int = 23) -> list[Rollout]:
    """Random tokens, from 1 to 20 of prompt and 1 to 30 of response; every fourth response has one token."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        prompt, response = rng.integers(1, 21), 1 if number % 4 == 0 else rng.integers(1, 31)
        tokens = rng.integers(0, VOCABULARY, prompt + response, dtype=np.int32)
        made.append(unsampled(f"s{number}", tokens[:prompt], tokens[prompt:]))
    return made


def assert_agree(scores: Sequence[Score], expected: Sequence[Score], top_k_close: float = CLOSE) -> None:
    assert [score.sample_id for score in scores] == [score.sample_id for score in expected]
    for score, other in zip(scores, expected, strict=True):
        np.testing.assert_allclose(score.log_probs, other.log_probs, rtol=0, atol=CLOSE)
        assert (score.top_k is None) == (other.top_k is None)
        if score.top_k is not None and other.top_k is not None:
            # Ids may swap where two tokens are as likely, to rounding: by the k-th largest, not by name.
            np.testing.assert_allclose(score.top_k.log_probs, other.top_k.log_probs, rtol=0, atol=top_k_close)
            assert (score.top_k.ids == other.top_k.ids).mean() > 0.99
            np.testing.assert_allclose(
                score.top_k.tail_log_probs, other.top_k.tail_log_probs, rtol=0, atol=CLOSE
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
    config: EngineConfig, model_dir: str, batches: Sequence[Sequence[Rollout]]
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


BAD_REQUESTS = {
    "longer than a micro-batch": (
        unsampled("long", np.zeros(60, np.int32), np.ones(37, np.int32)),
        "sample long has 97 tokens, which this layout pads to 97, above engine.micro_batch_tokens=96: "
        "raise it to at least 97",
    ),
    "longer than the model": (
        unsampled("longer", np.zeros(500, np.int32), np.ones(37, np.int32)),
        "sample longer: 537 tokens and 0 new ones do not fit the 512 positions",
    ),
    "another vocabulary": (
        unsampled("alien", np.zeros(2, np.int32), np.array([VOCABULARY], np.int32)),
        f"sample alien: token {VOCABULARY} is outside the vocabulary of {VOCABULARY}",
    ),
    "no response": (
        unsampled("mute", np.zeros(2, np.int32), np.empty(0, np.int32)),
        "sample mute: the response to score is empty",
    ),
}


def test_what_cannot_be_scored_is_named_before_anything_is_run(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(open_engine(megatron(), str(models / "qwen3"))) as engine:
        for request, message in BAD_REQUESTS.values():
            with pytest.raises(EngineError) as raised:
                engine.score([*requests(3), request])
            assert message in str(raised.value)
        with pytest.raises(EngineError, match="lower it to at most 129"):
            engine.score(requests(3), top_k=130)
        with pytest.raises(EngineError, match="only scores, and cannot sample"):
            engine.generate([], Sampling(), frozenset())

        def exhausted(*arguments: object, **options: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr("megatron_lopd.engines.megatron.response_top_k", exhausted)
        with pytest.raises(EngineError, match=r"out of memory .*micro_batch_tokens=96\): lower it"):
            list(engine.score(requests(3)))
        assert "\n" not in str(raised.value)


def test_a_score_that_is_not_finite_names_the_sample(models: Path, tmp_path: Path) -> None:
    broken = make_model_dir(tmp_path / "broken", vocab_size=VOCABULARY)
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][130] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    fine = [unsampled("fine", np.zeros(2, np.int32), np.ones(3, np.int32))]
    ill = unsampled("ill", np.array([130], np.int32), np.ones(3, np.int32))
    with closing(open_engine(megatron(), str(broken))) as engine:
        assert len(list(engine.score(fine, TOP_K))) == 1
        with pytest.raises(EngineError, match=r"sample ill: .* not finite in fp32: are its weights damaged"):
            list(engine.score([*fine, ill], TOP_K))


def test_a_model_that_one_rank_cannot_read_is_an_error_of_rank_0(models: Path, tmp_path: Path) -> None:
    """The rank that has the second stage finds its norm missing; all open the next model none the worse."""
    torn = make_model_dir(tmp_path / "torn", vocab_size=VOCABULARY)
    weights = load_file(torn / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()
    save_file(weights, torn / "model.safetensors", {"format": "pt"})
    parallel = LAYOUTS["pp2"][1]
    message, other = run_ranks(2, error_then_score, megatron(parallel), str(torn), str(models / "qwen3"))
    assert "model.norm.weight" in message
    assert other is None


def error_then_score(config: EngineConfig, torn: str, whole: str) -> str | None:
    from megatron_lopd.engines.megatron import leading, serve

    if os.environ["RANK"] != "0":
        serve()
        return None
    with leading():
        with pytest.raises(DataError) as raised:
            open_engine(config, torn)
        with closing(open_engine(config, whole)) as engine:
            assert len(list(engine.score(requests(5)))) == 5
    return str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["generate.engine.name=megatron"], "generate.engine.name=megatron cannot sample, only score"),
        (["score.engine.parallel={tensor: 2, processes: 2}"], "engine.parallel is of engine.name=megatron"),
        (["score.engine={name: megatron, fp8: {recipe: tensorwise}}"], "set engine.dtype=bf16"),
        (["score.engine={name: megatron, dtype: bf16, fp8: {recipe: delayed}}"], "tensorwise or blockwise"),
        (
            ["score.engine={name: megatron, parallel: {tensor: 3, processes: 3}}"],
            "parallel.tensor=3 does not divide the model's num_attention_heads=4",
        ),
        (["score.agreement={samples: 0}"], "drop the section for none"),
    ],
)
def test_a_recipe_it_cannot_follow(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    message: str,
) -> None:
    recipe = write_recipe(tmp_path).name
    monkeypatch.chdir(tmp_path)
    assert main(["score", recipe, *overrides]) == 2
    assert message in capsys.readouterr().err


def test_a_run_scored_by_two_ranks_after_both_engines_agreed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path).name
    monkeypatch.chdir(tmp_path)
    settings = ["score.top_k=4", "prompts.opd.count=20"]
    for stage in ("generate", "sft", "rollout", "score"):
        assert main([stage, recipe, *settings]) == 0
    plain = list(open_scores(Path("run/score")))
    shutil.rmtree("run/score")
    two_ranks = [
        *settings,
        "score.engine.name=megatron",
        "score.engine.parallel={pipeline: 2, processes: 2}",
        "score.agreement.samples=7",
    ]
    # Refused by both ranks, in one line, before a score is kept; and then let through.
    assert main(["run", recipe, *two_ranks, "score.agreement.mean=1e-12"]) == 3
    assert not list(Path("run/score").glob("*.arrow"))
    assert main(["run", recipe, *two_ranks]) == 0
    assert_agree(list(open_scores(Path("run/score"))), plain, KEPT)
    manifest = load_manifest(Path("run/score"))
    assert "agreement.json" in manifest.files
    assert json.loads(Path("run/score/agreement.json").read_text())["samples"] == 7
