"""The vllm engine, on vLLM's real CPU build, against the transformers engine and its own claims."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from megatron_lopd.artifacts.manifest import load_manifest
from megatron_lopd.cli import main
from megatron_lopd.config import EngineConfig, Sampling
from megatron_lopd.data.records import Rollout, Score
from megatron_lopd.engines import Prompted, kind_of, open_engine
from megatron_lopd.engines.process import EngineProcess
from megatron_lopd.engines.vllm import VllmOptions
from megatron_lopd.errors import EngineDied, EngineError
from tests.model_zoo import make_model_dir, unsampled
from tests.pipeline import SMALL, write_recipe
from tests.smollm2 import TOP_K, assert_agree
from tests.vllm_python import VLLM_PYTHON

CONFIG = EngineConfig(name="vllm", options=VllmOptions(str(VLLM_PYTHON)), batch_size=8)
VOCABULARY = 131
HEAD = 32  # the smallest that vLLM's attention on a CPU knows
TOKENS = 110  # the tokenizer's; the other rows are padding
END = frozenset({3, 7, 19, 40, 77, 101})  # so many that some responses end early
HORIZON = 12
# fp32 sums in another order: 1e-6 seen; the project's bound.
NATS = 1e-3
# Of the tail's mass, which vLLM's top k leaves as 1 minus a sum of fp32 probabilities.
TAIL_MASS = 1e-5
pytestmark = pytest.mark.timeout(900)  # starting takes a minute on a machine with nothing else to do


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    make_model_dir(path, vocab_size=VOCABULARY, max_position_embeddings=64, head_dim=HEAD, tokens=TOKENS)
    return str(path)


@pytest.fixture(scope="module")
def engine(model_dir: str) -> Iterator[EngineProcess]:
    opened = open_engine(CONFIG, model_dir)
    assert isinstance(opened, EngineProcess)
    yield opened
    opened.close()


def prompts(count: int) -> list[NDArray[np.int32]]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, VOCABULARY, rng.integers(1, 12), dtype=np.int32) for _ in range(count)]


def requests(count: int) -> list[Prompted]:
    """Seeds over the whole range that ours have."""
    return [Prompted(f"s{i}", each, seed=i * (2**63 // 64)) for i, each in enumerate(prompts(count))]


def test_samples_are_the_samplers_own_and_scored_alike_by_both_engines(
    engine: EngineProcess, model_dir: str
) -> None:
    asked = requests(40)
    done = list(engine.generate(asked, Sampling(max_new_tokens=HORIZON), END))
    assert [each.sample_id for each in done] == [each.sample_id for each in asked]
    for each in done:
        inside, last = each.response_tokens[:-1].tolist(), int(each.response_tokens[-1])
        assert not END & set(inside), "nothing after an end token"
        assert each.finish_reason == ("stop" if last in END else "length")
        assert each.finish_reason == "stop" or len(each.response_tokens) == HORIZON
        assert each.response_tokens.max() < TOKENS
    assert {each.finish_reason for each in done} == {"stop", "length"}

    reference = list(open_engine(EngineConfig(), model_dir).score(done, 5))
    for completion, alone, score, expected in zip(
        done, engine.score(done), engine.score(done, 5), reference, strict=True
    ):
        # At temperature 1 what was sampled from is what is scored.
        np.testing.assert_allclose(completion.log_probs, expected.log_probs, atol=NATS, rtol=0)
        np.testing.assert_allclose(alone.log_probs, expected.log_probs, atol=NATS, rtol=0)
        np.testing.assert_allclose(score.log_probs, expected.log_probs, atol=NATS, rtol=0)
        assert score.top_k is not None
        assert expected.top_k is not None
        np.testing.assert_array_equal(score.top_k.ids, expected.top_k.ids)
        np.testing.assert_allclose(score.top_k.log_probs, expected.top_k.log_probs, atol=NATS, rtol=0)
        np.testing.assert_allclose(
            np.exp(score.top_k.tail_log_probs), np.exp(expected.top_k.tail_log_probs), atol=TAIL_MASS, rtol=0
        )


def test_a_sample_depends_on_its_seed_and_on_nothing_beside_it(engine: EngineProcess) -> None:
    asked = requests(12)
    sampling = Sampling(max_new_tokens=HORIZON)
    together = list(engine.generate(asked, sampling, END))
    (alone,) = engine.generate(asked[7:8], sampling, END)
    np.testing.assert_array_equal(alone.response_tokens, together[7].response_tokens)
    backwards = list(engine.generate(asked[::-1], sampling, END))[::-1]
    for one, other in zip(together, backwards, strict=True):
        np.testing.assert_array_equal(one.response_tokens, other.response_tokens)
    prompt = asked[0].prompt_tokens
    same_prompt = [Prompted(f"t{seed}", prompt, seed) for seed in range(8)]
    drawn = {tuple(each.response_tokens) for each in engine.generate(same_prompt, sampling, END)}
    assert len(drawn) > 4, "other seeds draw other tokens"


def test_log_probs_of_another_temperature_and_of_a_cut_distribution(
    engine: EngineProcess, model_dir: str
) -> None:
    """The sampler's own distribution, of a model that both engines score alike: its whole vocabulary. And the
    model's own beside it."""
    asked = requests(6)
    sampling = Sampling(max_new_tokens=4, temperature=0.7, top_k=3)
    done = list(engine.generate(asked, sampling, END))
    for completion, score in zip(done, open_engine(EngineConfig(), model_dir).score(done, 3), strict=True):
        assert score.top_k is not None
        warmed = score.top_k.log_probs.astype(np.float64) / 0.7
        warmed -= np.log(np.exp(warmed).sum(axis=1, keepdims=True))
        at = score.top_k.ids == completion.response_tokens[:, None]
        assert at.any(axis=1).all(), "only the likeliest three are drawn"
        np.testing.assert_allclose(completion.log_probs, warmed[at], atol=NATS, rtol=0)
        assert completion.untruncated_log_probs is not None
        np.testing.assert_allclose(completion.untruncated_log_probs, score.log_probs, atol=NATS, rtol=0)


def test_greedy_is_the_other_engines_and_has_the_log_probs_of_temperature_1(
    engine: EngineProcess, model_dir: str
) -> None:
    asked, greedy = requests(12), Sampling(max_new_tokens=HORIZON, temperature=0)
    expected = list(open_engine(EngineConfig(), model_dir).generate(asked, greedy, END))
    for one, other in zip(engine.generate(asked, greedy, END), expected, strict=True):
        np.testing.assert_array_equal(one.response_tokens, other.response_tokens)
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=NATS, rtol=0)


@pytest.mark.nightly  # a start of vLLM, for a model with long prompts
def test_long_prompts_that_no_step_holds_together_are_sampled_by_their_seeds(tmp_path: Path) -> None:
    """64 prompts of 40 to 900 tokens, and one as long as the model's positions let it be."""
    positions, new = 3000, 4
    make_model_dir(tmp_path, vocab_size=VOCABULARY, max_position_embeddings=positions, head_dim=HEAD)
    rng = np.random.default_rng(7)
    lengths = [*rng.integers(40, 900, 64), positions - new]
    asked = [
        Prompted(f"s{at}", rng.integers(1, VOCABULARY, length, dtype=np.int32), seed=at)
        for at, length in enumerate(lengths)
    ]
    sampling = Sampling(max_new_tokens=new)
    with closing(open_engine(replace(CONFIG, batch_size=64), str(tmp_path))) as opened:
        together = list(opened.generate(asked, sampling, END))
        for at in (0, 31, 64):
            (alone,) = opened.generate([asked[at]], sampling, END)
            np.testing.assert_array_equal(alone.response_tokens, together[at].response_tokens)
        scores = opened.score(together)
        for rollout, score in zip(together, scores, strict=True):
            np.testing.assert_allclose(rollout.log_probs, score.log_probs, atol=NATS, rtol=0)


@pytest.mark.nightly  # a start of vLLM for each model
def test_a_real_model_is_scored_as_by_transformers(
    smollm2: Path, smollm2_asked: list[Rollout], smollm2_scores: list[Score]
) -> None:
    """SmolLM2-135M on text; test_smollm2.py holds the megatron engine to the same scores."""
    with closing(open_engine(CONFIG, str(smollm2))) as opened:
        assert_agree(list(opened.score(smollm2_asked, TOP_K)), smollm2_scores)


@pytest.mark.nightly  # a start of vLLM; those above compare it in fp32
def test_a_bf16_model_has_its_output_layer_in_fp32(tmp_path: Path) -> None:
    """Of a model whose layers add nothing, so that both engines have the same bf16 hidden states."""
    make_model_dir(tmp_path, vocab_size=VOCABULARY, max_position_embeddings=64, head_dim=HEAD)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
    weights["lm_head.weight"] *= 3 / weights["lm_head.weight"].std()  # logits to 40: in bf16, steps of 1/4
    save_file(weights, path, metadata={"format": "pt"})
    rng = np.random.default_rng(4)
    prompt = np.array([1, 2, 3], dtype=np.int32)
    asked = [unsampled(f"s{at}", prompt, rng.integers(1, VOCABULARY, 40, dtype=np.int32)) for at in range(4)]
    config = replace(CONFIG, dtype="bf16")
    assert kind_of(config).versions(config)["vllm output layer"] == "fp32"
    with closing(open_engine(config, str(tmp_path))) as opened:
        scores = list(opened.score(asked, TOP_K))
    expected = open_engine(EngineConfig(dtype="bf16"), str(tmp_path)).score(asked, TOP_K)
    for score, reference in zip(scores, expected, strict=True):
        # fp32 sums of 32 products in another order; a bf16 output layer is off by up to 0.1.
        np.testing.assert_allclose(score.log_probs, reference.log_probs, atol=1e-4, rtol=0)
        assert score.top_k is not None
        assert (np.diff(score.top_k.log_probs) < 0).all(), "no ties"


@pytest.mark.nightly  # two workers; test_load_weights.py and fault/test_online.py kill engines by day
def test_a_killed_worker_is_an_engine_that_died_and_none_is_left(
    model_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers of vLLM's own, each with a part of the model."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else it wants a NUMA node for each
    prompt = np.array([1, 2, 3], dtype=np.int32)
    with closing(
        open_engine(replace(CONFIG, options=VllmOptions(str(VLLM_PYTHON), tensor=2)), model_dir)
    ) as opened:
        assert isinstance(opened, EngineProcess)
        children = psutil.Process(opened.pid).children(recursive=True)
        workers = [child for child in children if "Worker" in child.name()]
        assert len(workers) == 2
        assert len(list(opened.score([unsampled("a", prompt, prompt)]))) == 1
        workers[1].kill()
        with pytest.raises(EngineDied, match="vLLM failed"):
            list(opened.score([unsampled("a", prompt, prompt)]))
    _, left = psutil.wait_procs(children, timeout=0)
    assert not [child for child in left if child.status() != "zombie"]


def test_what_cannot_be_run_is_refused_in_a_line(engine: EngineProcess) -> None:
    prompt = np.array([1, 2, 3], dtype=np.int32)
    beyond = np.array([1, VOCABULARY], dtype=np.int32)
    with pytest.raises(EngineError, match=f"sample a: token {VOCABULARY} is outside the vocabulary"):
        list(engine.score([unsampled("a", prompt, beyond)]))
    with pytest.raises(EngineError, match="sample b: 3 tokens and 62 new ones do not fit the 64 positions"):
        list(engine.generate([Prompted("b", prompt, 1)], Sampling(max_new_tokens=62), END))
    with pytest.raises(EngineError, match=r"score\.top_k=130 leaves none of the 131 tokens"):
        list(engine.score([unsampled("c", prompt, prompt)], 130))
    sampling = Sampling(max_new_tokens=2, temperature=0.001)
    with pytest.raises(EngineError, match=r"sampling\.temperature=0\.001 is less than vLLM can do"):
        list(engine.generate([Prompted("d", prompt, 1)], sampling, END))
    # All 64 positions can be used, to sample and to score.
    (done,) = engine.generate([Prompted("e", prompt, 1)], Sampling(max_new_tokens=61), frozenset())
    assert len(done.response_tokens) == 61
    assert done.finish_reason == "length"
    (score,) = engine.score([unsampled("e", prompt, done.response_tokens)])
    np.testing.assert_allclose(score.log_probs, done.log_probs, atol=NATS, rtol=0)


def test_a_model_that_vllm_refuses_is_one_line(tmp_path: Path) -> None:
    make_model_dir(tmp_path, head_dim=HEAD)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchForCausalLM"]}))
    with pytest.raises(EngineError, match="vLLM does not load the model") as caught:
        open_engine(CONFIG, str(tmp_path))
    assert "\n" not in str(caught.value)
    assert "NoSuchForCausalLM" in str(caught.value)


def test_a_whole_stage_names_its_engine_and_an_interpreter_without_vllm_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model_dir(tmp_path / "teacher", seed=1, **SMALL, head_dim=HEAD)
    make_model_dir(tmp_path / "student", seed=2, tied=True, **SMALL)
    write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "recipe.yaml", "generate.engine.name=vllm"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "generate.engine.name=vllm: this Python has no vllm" in line
    asked = ["generate.engine.name=vllm", f"generate.engine.vllm.python={VLLM_PYTHON}"]
    assert main(["generate", "recipe.yaml", *asked]) == 0
    manifest = load_manifest(tmp_path / "run" / "generate")
    assert manifest.versions["vllm"].startswith("0.")
    assert manifest.config["engine"]["name"] == "vllm"
    assert manifest.counts["samples"] == 40


def test_killed_it_says_so_and_leaves_nothing_behind(engine: EngineProcess) -> None:
    """Last: the module's engine is gone after it."""
    children = psutil.Process(engine.pid).children(recursive=True)
    os.kill(engine.pid, signal.SIGKILL)
    prompt = np.array([1, 2, 3], dtype=np.int32)
    with pytest.raises(EngineDied, match=rf"vllm's process \(pid {engine.pid}\) was killed by SIGKILL"):
        list(engine.score([unsampled("a", prompt, prompt)]))
    psutil.wait_procs(children, timeout=10)
    assert not [child for child in children if child.is_running() and child.status() != "zombie"]
