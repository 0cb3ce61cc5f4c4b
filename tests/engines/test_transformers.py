"""The transformers engine against transformers itself, an fp64 forward and the distribution it claims."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron_lopd.config import EngineConfig, Sampling
from megatron_lopd.data.records import Rollout
from megatron_lopd.engines import Engine, Prompted, open_engine, transformers_engine
from megatron_lopd.engines import requests as engine_requests
from megatron_lopd.engines.draw import BLOCK, draw, truncated_log_probs, uniforms
from megatron_lopd.errors import DataError, EngineError
from tests.model_zoo import unsampled

VOCABULARY = 53
END = frozenset({3, 7})
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 320,
    "initializer_range": 0.3,  # so that the distributions are far from uniform, as a trained model's are
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("qwen3")
    Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=True)).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def engine(model_dir: str) -> Engine:
    return open_engine(EngineConfig(batch_size=7), model_dir)


def prompts(count: int) -> list[NDArray[np.int32]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCABULARY, rng.integers(1, 12), dtype=np.int32) for _ in range(count)]


def requests(count: int) -> list[Prompted]:
    return [Prompted(f"s{i}", tokens, seed=1000 + i) for i, tokens in enumerate(prompts(count))]


def distributions(model_dir: str, request: Rollout) -> NDArray[np.float64]:
    """Log-probs of the whole vocabulary at each response position [T, V]: one sample alone, in float64."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64, attn_implementation="eager")
    tokens = torch.tensor(np.concatenate([request.prompt_tokens, request.response_tokens])[None]).long()
    with torch.no_grad():
        log_probs = model(tokens).logits[0].log_softmax(-1)
    return log_probs[len(request.prompt_tokens) - 1 : -1].numpy()


def oracle(model_dir: str, request: Rollout) -> NDArray[np.float64]:
    """Log-probs of the response tokens [T], in float64."""
    rows = distributions(model_dir, request)
    return np.array([row[token] for row, token in zip(rows, request.response_tokens, strict=True)])


def test_greedy_is_what_transformers_generates(model_dir: str, engine: Engine) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    finished = set()
    asked = requests(12)
    for request, completion in zip(
        asked, engine.generate(asked, Sampling(max_new_tokens=24, temperature=0), END), strict=True
    ):
        prompt = torch.tensor(request.prompt_tokens[None].astype(np.int64))
        with torch.no_grad():
            # The mask is given since generate() would take a prompt's own token 0 for padding.
            generated = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=24,
                do_sample=False,
                eos_token_id=list(END),
                pad_token_id=0,
            )
        expected = generated[0, prompt.shape[1] :].tolist()
        assert completion.response_tokens.tolist() == expected
        assert completion.finish_reason == ("stop" if expected[-1] in END else "length")
        finished.add(completion.finish_reason)
    assert finished == {"stop", "length"}


def test_scores_are_those_of_each_sample_alone_in_float64(model_dir: str, engine: Engine) -> None:
    rng = np.random.default_rng(1)
    # Responses of very different lengths share a batch: the short ones' FIRST positions must be kept.
    lengths = [1, 60, 2, 1, 30, 5, 60, 1, 17, 9]
    asked = [
        unsampled(f"s{i}", prompt, rng.integers(0, VOCABULARY, length, dtype=np.int32))
        for i, (prompt, length) in enumerate(zip(prompts(len(lengths)), lengths, strict=True))
    ]
    for request, score in zip(asked, engine.score(asked), strict=True):
        assert (score.sample_id, score.top_k) == (request.sample_id, None)
        scores = score.log_probs
        assert scores.dtype == np.float32
        assert scores.max() <= 0
        # Log-probs reach -20 here, where one float32 rounding is 1e-6; logits are sums of 32 such products.
        np.testing.assert_allclose(scores, oracle(model_dir, request), rtol=0, atol=2e-5)


@pytest.mark.parametrize("top_k", [1, 7, VOCABULARY - 2])
def test_top_k_scores_are_those_of_the_whole_distribution_in_float64(
    model_dir: str, engine: Engine, top_k: int
) -> None:
    rng = np.random.default_rng(2)
    asked = [
        unsampled(f"s{i}", prompt, rng.integers(0, VOCABULARY, length, dtype=np.int32))
        for i, (prompt, length) in enumerate(zip(prompts(4), [1, 30, 3, 17], strict=True))
    ]
    for request, score in zip(asked, engine.score(asked, top_k), strict=True):
        rows, top = distributions(model_dir, request), score.top_k
        assert top is not None
        assert (top.ids.dtype, top.log_probs.dtype) == (np.int32, np.float32)
        assert max(top.log_probs.max(), top.tail_log_probs.max()) <= 0
        np.testing.assert_array_equal(top.ids, np.argsort(-rows, axis=-1)[:, :top_k])
        # As above: roundings of fp32 logits and log-sum-exps.
        np.testing.assert_allclose(
            top.log_probs, np.take_along_axis(rows, top.ids, axis=-1), rtol=0, atol=2e-5
        )
        np.testing.assert_allclose(score.log_probs, oracle(model_dir, request), rtol=0, atol=2e-5)
        left = rows.copy()  # the tail: neither the top k nor the token itself
        np.put_along_axis(left, top.ids, -np.inf, axis=-1)
        np.put_along_axis(left, request.response_tokens[:, None], -np.inf, axis=-1)
        np.testing.assert_allclose(top.tail_log_probs, np.logaddexp.reduce(left, axis=-1), rtol=0, atol=2e-5)


def test_a_top_k_that_leaves_no_tail_is_refused(engine: Engine) -> None:
    with pytest.raises(EngineError, match=rf"score\.top_k=52 .* lower it to at most {VOCABULARY - 2}$"):
        engine.score([unsampled("s", *prompts(2))], VOCABULARY - 1)


def test_scores_do_not_depend_on_how_much_is_held(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [unsampled(f"s{i}", tokens, tokens) for i, tokens in enumerate(prompts(30))]
    whole = list(engine.score(asked, 3))
    monkeypatch.setattr(transformers_engine, "LOGITS_ELEMENTS", 4 * VOCABULARY)
    monkeypatch.setattr(engine_requests, "SCORED_BYTES", 1)
    for one, other in zip(whole, engine.score(asked, 3), strict=True):
        assert one.sample_id == other.sample_id
        assert one.top_k is not None
        assert other.top_k is not None
        # Matrix products of other shapes may sum in another order: a few roundings of logits below 20.
        np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=0, atol=1e-5)
        np.testing.assert_allclose(one.top_k.log_probs, other.top_k.log_probs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.0, top_p=0.9),
        Sampling(),
        Sampling(temperature=0.6, top_p=0.95, top_k=20),
        Sampling(temperature=1.5),
        Sampling(top_k=5),
    ],
)
def test_behaviour_log_probs_are_the_scores_of_what_was_sampled(engine: Engine, sampling: Sampling) -> None:
    done = list(engine.generate(requests(20), replace(sampling, max_new_tokens=40), END))
    for rollout, scores in zip(done, engine.score(done), strict=True):
        assert (rollout.untruncated_log_probs is None) == sampling.is_plain
        assert rollout.behaviour_log_probs is not None
        # Cached and padded attention against whole sequences, both fp32.
        np.testing.assert_allclose(rollout.behaviour_log_probs, scores.log_probs, rtol=0, atol=2e-5)


def test_the_end_token_is_kept_and_nothing_after_it(engine: Engine) -> None:
    asked = requests(200)
    done = list(engine.generate(asked, Sampling(max_new_tokens=25), END))
    assert [completion.sample_id for completion in done] == [request.sample_id for request in asked]
    stopped = [completion for completion in done if completion.finish_reason == "stop"]
    assert 20 < len(stopped) < 200
    for completion in done:
        tokens = completion.response_tokens
        ends = [token in END for token in tokens.tolist()]
        assert not any(ends[:-1])
        assert ends[-1] == (completion.finish_reason == "stop")
        assert completion.finish_reason == "stop" or len(tokens) == 25
        assert len(completion.log_probs) == len(tokens)


def test_a_sample_does_not_depend_on_its_batch(model_dir: str) -> None:
    """Other batch sizes, other neighbours, another order: the same tokens, past a refill of the draws."""
    asked = requests(24)
    sampling = Sampling(max_new_tokens=BLOCK + 20)
    results = {}
    for batch_size, order in ((1, asked), (5, asked), (24, asked[::-1]), (7, asked[10:])):
        engine = open_engine(EngineConfig(batch_size=batch_size), model_dir)
        for completion in engine.generate(order, sampling, frozenset({3})):
            kept = results.setdefault(completion.sample_id, completion)
            assert completion.response_tokens.tolist() == kept.response_tokens.tolist()
            assert completion.finish_reason == kept.finish_reason
            np.testing.assert_allclose(completion.log_probs, kept.log_probs, rtol=0, atol=2e-5)
    assert max(len(completion.response_tokens) for completion in results.values()) > BLOCK
    other = replace(asked[0], seed=5)
    (completion,) = engine.generate([other], sampling, frozenset({3}))
    assert completion.response_tokens.tolist() != results["s0"].response_tokens.tolist()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=1),
        Sampling(max_new_tokens=1, temperature=0.7, top_p=0.8),
        Sampling(max_new_tokens=1, temperature=1.3, top_k=6),
    ],
)
def test_tokens_come_as_often_as_their_log_probs_say(
    model_dir: str, engine: Engine, sampling: Sampling
) -> None:
    draws, prompt = 4000, np.array([11, 12, 13], dtype=np.int32)
    engine = open_engine(EngineConfig(batch_size=1000), model_dir)
    asked = [Prompted(str(seed), prompt, seed) for seed in range(draws)]
    counts, said = np.zeros(VOCABULARY), np.full(VOCABULARY, -np.inf)
    for completion in engine.generate(asked, sampling, END):
        counts[completion.response_tokens[0]] += 1
        said[completion.response_tokens[0]] = completion.log_probs[0]
    score = np.array(
        [
            oracle(model_dir, unsampled("", prompt, np.array([t], dtype=np.int32)))[0]
            for t in range(VOCABULARY)
        ]
    )
    expected = reference_distribution(score, sampling)
    seen = counts > 0
    assert not (seen & (expected == 0)).any()
    np.testing.assert_allclose(said[seen], np.log(expected[seen]), rtol=0, atol=2e-5)
    common = expected * draws >= 5  # where a chi-square statistic is close to its distribution
    chi_square = ((counts - expected * draws)[common] ** 2 / (expected * draws)[common]).sum()
    # Mean = degrees of freedom k, deviation sqrt(2k): 4 deviations, with seeds fixed so that it cannot flake.
    assert chi_square < common.sum() + 4 * np.sqrt(2 * common.sum())


def reference_distribution(log_probs: NDArray[np.float64], sampling: Sampling) -> NDArray[np.float64]:
    """Temperature, top-k and top-p one token at a time."""
    p = np.exp(log_probs / sampling.temperature)
    p /= p.sum()
    ranked = sorted(range(len(p)), key=lambda token: -p[token])
    kept, mass = [], 0.0
    for token in ranked[: sampling.top_k or len(p)]:
        if mass >= sampling.top_p * p[ranked[: sampling.top_k or len(p)]].sum():
            break
        kept.append(token)
        mass += p[token]
    result = np.zeros_like(p)
    result[kept] = p[kept] / p[kept].sum()
    return result


def test_top_k_and_top_p_together_against_the_reference() -> None:
    logits = torch.randn(40, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 3
    for top_k, top_p in ((0, 1.0), (5, 1.0), (0, 0.6), (8, 0.7), (1, 0.5), (VOCABULARY + 1, 0.9)):
        sampling = Sampling(temperature=0.8, top_k=top_k, top_p=top_p)
        for row, log_probs in zip(logits, truncated_log_probs(logits, sampling), strict=True):
            expected = reference_distribution(row.double().log_softmax(-1).numpy(), sampling)
            np.testing.assert_allclose(log_probs.exp().numpy(), expected, rtol=0, atol=1e-12)


def test_the_ends_of_the_unit_interval_never_draw_an_impossible_token() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf, 2.0, -torch.inf]]).expand(2, -1)
    tokens, log_probs = draw(logits, Sampling(), torch.tensor([2.0**-53, 1.0], dtype=torch.float64))
    assert tokens.tolist() == [1, 4]
    assert bool(log_probs.isfinite().all())
    assert log_probs.shape == (1, 2)


def test_draws_are_a_stream_by_seed() -> None:
    first = uniforms([1, 2], 0)
    assert float(first.min()) > 0
    assert float(first.max()) <= 1
    assert torch.equal(uniforms([2], 0)[0], first[1])
    assert not torch.equal(first[0], first[1])
    # Consecutive blocks continue one Philox stream; its words are pinned by numpy's stability promise.
    words = np.random.Philox(key=2).random_raw(2 * BLOCK)
    stream = torch.cat([uniforms([2], 0)[0], uniforms([2], 1)[0]])
    np.testing.assert_array_equal(stream.numpy(), ((words >> np.uint64(11)) + 1) * 2.0**-53)


def test_bf16_scores_are_near_those_in_fp32(model_dir: str, engine: Engine) -> None:
    asked = [unsampled(f"s{i}", tokens, tokens) for i, tokens in enumerate(prompts(9))]
    exact = np.concatenate([score.log_probs for score in engine.score(asked)])
    bf16 = open_engine(EngineConfig(dtype="bf16"), model_dir)
    rounded = np.concatenate([score.log_probs for score in bf16.score(asked)])
    # Weights and activations carry 2^-9 each; log-probs here reach -20.
    assert np.abs(rounded - exact).mean() < 0.1
    assert not np.array_equal(rounded, exact)


def test_an_output_bias_and_untied_embeddings_are_scored(tmp_path: Path) -> None:
    torch.manual_seed(1)
    Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=False)).save_pretrained(tmp_path)
    (request,) = [unsampled("s", *prompts(2))]
    (score,) = open_engine(EngineConfig(), str(tmp_path)).score([request])
    np.testing.assert_allclose(score.log_probs, oracle(str(tmp_path), request), rtol=0, atol=2e-5)


def test_bad_requests_name_the_sample(engine: Engine) -> None:
    def generate(tokens: list[int], new: int = 1) -> None:
        request = Prompted("s7", np.array(tokens, dtype=np.int32), 0)
        list(engine.generate([request], Sampling(max_new_tokens=new), END))

    with pytest.raises(EngineError, match="sample s7: token 53 is outside the vocabulary of 53"):
        generate([1, VOCABULARY])
    with pytest.raises(EngineError, match="sample s7: token -1 is outside"):
        generate([-1])
    with pytest.raises(EngineError, match="sample s7: the prompt is empty"):
        generate([])
    with pytest.raises(
        EngineError, match=r"sample s7: 2 tokens and 319 new ones do not fit the 320 positions"
    ):
        generate([1, 2], new=319)
    empty = unsampled("s7", np.ones(1, dtype=np.int32), np.ones(0, dtype=np.int32))
    with pytest.raises(EngineError, match="sample s7: the response to score is empty"):
        engine.score([empty])


def test_running_out_of_memory_says_what_to_lower(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\n and more lines")

    monkeypatch.setattr(engine, "_hidden", fail)
    with pytest.raises(EngineError, match=r"out of memory .*batch_size=7\): lower engine\.batch_size$"):
        list(engine.score([unsampled("s", *prompts(2))]))
    with pytest.raises(EngineError, match=r"lower engine\.batch_size \(or sampling.max_new_tokens"):
        list(engine.generate(requests(1), Sampling(max_new_tokens=2), END))


def copy_with(model_dir: str, path: Path, change: str) -> str:
    """The model with one thing wrong with it."""
    tensors = load_file(Path(model_dir, "model.safetensors"))
    config = json.loads(Path(model_dir, "config.json").read_text())
    norm = "model.norm.weight"
    if change == "missing":
        del tensors[norm]
    if change == "mismatched":
        tensors[norm] = torch.ones(33)
    if change == "nan":
        tensors[norm] = torch.full_like(tensors[norm], torch.nan)
    if change == "unknown":
        config["model_type"] = "no_such_model"
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    if change == "truncated":
        data = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(data[:-100])
    if change == "pickle":
        torch.save(tensors, path / "pytorch_model.bin")
        (path / "model.safetensors").unlink()
    return str(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "1 weights are missing, the first is model.norm.weight"),
        ("mismatched", "1 weights are mismatched"),
        ("unknown", "the model does not load"),
        ("truncated", "the model does not load"),
        ("pickle", "pickles are never loaded"),
        ("nan", "changes its logits|not finite"),
    ],
)
def test_a_model_that_does_not_load_is_one_line(
    model_dir: str, tmp_path: Path, change: str, message: str
) -> None:
    with pytest.raises((DataError, EngineError), match=message) as caught:
        open_engine(EngineConfig(), copy_with(model_dir, tmp_path / "bad", change))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "bad") in str(caught.value)


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent: no such model directory"):
        open_engine(EngineConfig(), str(tmp_path / "absent"))


def test_a_model_that_scales_its_logits_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=2.0)).save_pretrained(tmp_path)
    with pytest.raises(EngineError, match="granite changes its logits after the output layer"):
        open_engine(EngineConfig(), str(tmp_path))


def test_a_gpus_output_layer_is_the_models_own_and_multiplied_into_fp32(model_dir: str) -> None:
    """Here by the products that a CPU has instead, which are the same: of bf16 numbers, added up in fp32."""
    cpu = open_engine(EngineConfig(dtype="bf16"), model_dir)
    assert isinstance(cpu, transformers_engine.TransformersEngine)
    weight = cpu._head.weight.detach()
    asked = [unsampled("a", np.array([1, 2], dtype=np.int32), np.arange(20, dtype=np.int32))]
    (expected,) = cpu.score(asked, 4)
    assert cpu._head_weight.dtype == torch.float32
    cpu._head_weight = transformers_engine._head_weight(weight, torch.device("cuda"))
    assert cpu._head_weight is weight
    (score,) = cpu.score(asked, 4)
    np.testing.assert_array_equal(score.log_probs, expected.log_probs)
    assert score.top_k is not None
    assert expected.top_k is not None
    np.testing.assert_array_equal(score.top_k.ids, expected.top_k.ids)
    np.testing.assert_array_equal(score.top_k.tail_log_probs, expected.top_k.tail_log_probs)
