"""The `vllm` engine: offline `vllm.LLM`, token ids in and out. Run in a process of its own (process.py)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig

from megatron_lopd.config import EngineConfig, Sampling
from megatron_lopd.data.records import FinishReason, Rollout, Score, TopK
from megatron_lopd.engines.protocol import Prompted
from megatron_lopd.engines.requests import check_finite, check_scoring, check_tokens, tokenless_ids
from megatron_lopd.engines.vllm import head_precision
from megatron_lopd.errors import EngineDied, EngineError, is_out_of_memory

# The engine core in this process: it ends with it, and its errors are raised here.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"  # for the token that scoring has to generate; see LLM below
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; without a GPU alone

# Tokens run at once. Scoring holds [tokens, vocabulary] in fp32, some copies of it, that vLLM does not count.
BATCHED_TOKENS = 2048

# Log-probs that vLLM holds as Python numbers before they become arrays, about 100 bytes each.
HELD_LOG_PROBS = 1 << 22

# Below this vLLM takes another temperature than the one it is given, with a warning.
LEAST_TEMPERATURE = 1e-2

LONGEST_REASON = 400  # characters of vLLM's own words in an error

# The least mass that 1 minus a sum of fp32 probabilities can tell from nothing.
RESOLUTION = 2.0**-24


class VllmEngine:
    """See `Engine` for what the methods return.

    The tail's mass is 1 minus the rest's, in float64 from fp32 log-probs: good to about 1e-6 of mass, never
    below 2^-24 by itself, and never more than the tokens left over times the k-th probability, which is what
    bounds it where the teacher is sure. The output layer's product is in fp32 where vLLM can
    (`head_precision`). Raises EngineError when vLLM refuses the model.
    """

    def __init__(self, config: EngineConfig, model_dir: str) -> None:
        self._config, self._model_dir = config, model_dir
        try:
            from vllm import LLM

            settings = AutoConfig.from_pretrained(
                model_dir, local_files_only=True, trust_remote_code=config.trust_remote_code
            )
            self._vocabulary: int = settings.vocab_size
            self._positions: int | None = getattr(settings, "max_position_embeddings", None)
            self._tokenless = tokenless_ids(config, model_dir, self._vocabulary)
            self._llm: Any = LLM(
                model=model_dir,
                skip_tokenizer_init=True,
                trust_remote_code=config.trust_remote_code,
                dtype={"fp32": "float32", "bf16": "bfloat16"}[config.dtype],
                tensor_parallel_size=config.options.tensor,
                hf_overrides=_overrides(config),
                gpu_memory_utilization=config.options.memory_share,
                max_num_seqs=config.batch_size,
                **_batching(config.batch_size, None if self._positions is None else self._positions + 1),
                max_logprobs=-1,
                logprobs_mode="processed_logprobs",
                generation_config="vllm",
                load_format="safetensors",
                enable_prefix_caching=True,  # requests for prompt log-probs do not read it
                enforce_eager=not _has_gpu(),
            )
        except (ImportError, OSError, ValueError, KeyError, RuntimeError, AssertionError) as error:
            raise EngineError(f"{model_dir}: vLLM does not load the model: {_in_a_line(error)}") from error

    def generate(
        self, requests: Sequence[Prompted], sampling: Sampling, end_tokens: frozenset[int]
    ) -> Iterator[Rollout]:
        """Sample one response a request. At temperature 0 the log-probs are those of temperature 1.

        vLLM tells either the log-probs that it drew from or the model's own. Where they differ it is asked
        for the model's own afterwards, by scoring what it drew: one more pass over prompt and response. Ids
        without a token are not barred where that would make them differ, but drawn again (`_drawn_again`).

        Raises EngineError as TransformersEngine does, and for a temperature that vLLM would change.
        """
        if 0 < sampling.temperature < LEAST_TEMPERATURE:
            raise EngineError(
                f"sampling.temperature={sampling.temperature:g} is less than vLLM can do: set it to 0, or to "
                f"at least {LEAST_TEMPERATURE:g}"
            )
        for request in requests:
            check_tokens(
                request.sample_id,
                request.prompt_tokens,
                sampling.max_new_tokens,
                self._vocabulary,
                self._positions,
                self._model_dir,
            )
        at_a_time = max(self._config.batch_size, HELD_LOG_PROBS // sampling.max_new_tokens)
        for start in range(0, len(requests), at_a_time):
            window = requests[start : start + at_a_time]
            settings = [sampling] * len(window)
            rollouts = self._sampled(window, settings, end_tokens, barring=not sampling.is_plain)
            if sampling.is_plain:
                yield from self._drawn_again(window, rollouts, sampling, end_tokens)
                continue
            for rollout, score in zip(rollouts, self.score(rollouts), strict=True):
                yield replace(rollout, untruncated_log_probs=score.log_probs)

    def _sampled(
        self,
        requests: Sequence[Prompted],
        settings: Sequence[Sampling],
        end_tokens: frozenset[int],
        barring: bool,
    ) -> list[Rollout]:
        """A response each, with the log-probs of what vLLM drew from; `barring`: no id without a token."""
        from vllm import SamplingParams

        allowed = None
        if barring and len(self._tokenless):
            allowed = np.setdiff1d(np.arange(self._vocabulary), self._tokenless).tolist()
        parameters = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=request.seed,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=sorted(end_tokens),
                ignore_eos=True,  # the model's own idea of its end tokens; ours are above
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                allowed_token_ids=allowed,
            )
            for request, sampling in zip(requests, settings, strict=True)
        ]
        outputs = self._run([request.prompt_tokens for request in requests], parameters)
        return [
            self._rollout(request, output.outputs[0], sampling, end_tokens)
            for request, sampling, output in zip(requests, settings, outputs, strict=True)
        ]

    def _drawn_again(
        self,
        requests: Sequence[Prompted],
        rollouts: Sequence[Rollout],
        sampling: Sampling,
        end_tokens: frozenset[int],
    ) -> Iterator[Rollout]:
        """`rollouts`, those with an id without a token drawn on from there with these barred.

        At every place that is a draw from the tokens alone: what p gives to others is given to tokens as p
        would have it without them. The model's own log-probs, which barring hides, are then asked for.
        """
        good = [each.response_tokens[: self._speakable(each.response_tokens)] for each in rollouts]
        cut = [at for at, rollout in enumerate(rollouts) if len(good[at]) < len(rollout.response_tokens)]
        if not cut:
            return iter(rollouts)
        again = [
            Prompted(
                requests[at].sample_id,
                np.concatenate([requests[at].prompt_tokens, good[at]]),
                requests[at].seed ^ 1,
            )
            for at in cut
        ]
        left = [replace(sampling, max_new_tokens=sampling.max_new_tokens - len(good[at])) for at in cut]
        drawn = [
            replace(
                rest,
                prompt_tokens=requests[at].prompt_tokens,
                response_tokens=np.concatenate([good[at], rest.response_tokens]),
            )
            for at, rest in zip(cut, self._sampled(again, left, end_tokens, barring=True), strict=True)
        ]
        scores = {score.sample_id: score.log_probs for score in self.score(drawn)}
        whole = {each.sample_id: replace(each, log_probs=scores[each.sample_id]) for each in drawn}
        return (whole.get(rollout.sample_id, rollout) for rollout in rollouts)

    def _speakable(self, tokens: NDArray[np.int32]) -> int:
        """How many of a response's tokens come before its first id without a token."""
        (found,) = np.isin(tokens, self._tokenless).nonzero()
        return int(found[0]) if len(found) else len(tokens)

    def score(self, rollouts: Sequence[Rollout], top_k: int = 0) -> Iterator[Score]:
        """Scores of given responses. Raises as `generate`."""
        tokens = self._vocabulary - len(self._tokenless)
        check_scoring(rollouts, top_k, self._vocabulary, tokens, self._positions, self._model_dir)
        return (score for window in _windows(rollouts, top_k) for score in self._score_window(window, top_k))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Refused: not built."""
        raise EngineError("engine.name=vllm cannot take new weights")

    def close(self) -> None:
        """Nothing is left to do: it ends with its process."""

    def _score_window(self, rollouts: Sequence[Rollout], top_k: int) -> Iterator[Score]:
        for rollout, (ids, log_probs) in zip(rollouts, self._likeliest(rollouts, top_k), strict=True):
            if top_k and np.isin(ids[:, 1:], self._tokenless).any():
                more = min(top_k + len(self._tokenless), self._vocabulary)
                (wider,) = self._likeliest([rollout], more)
                yield self._score(rollout, *wider, top_k)
            else:
                yield self._score(rollout, ids, log_probs, top_k)

    def _likeliest(
        self, rollouts: Sequence[Rollout], count: int
    ) -> Iterator[tuple[NDArray[np.int32], NDArray[np.float32]]]:
        """Of each rollout ids and log-probs [T, 1 + count] of the token itself, then of the likeliest."""
        from vllm import SamplingParams

        tokens = [np.concatenate([each.prompt_tokens, each.response_tokens]) for each in rollouts]
        parameters = SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=count, flat_logprobs=True, detokenize=False
        )
        for rollout, output in zip(rollouts, self._run(tokens, [parameters] * len(tokens)), strict=True):
            yield self._rows(rollout, output.prompt_logprobs, count)

    def _rows(self, rollout: Rollout, flat: Any, count: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Those of the response, from vLLM's of all, end to end."""
        first = len(rollout.prompt_tokens)
        begin = flat.start_indices[first]
        shape = len(rollout.response_tokens), count + 1
        ids = np.array(flat.token_ids[begin:], dtype=np.int32)
        log_probs = np.array(flat.logprobs[begin:], dtype=np.float32)
        if ids.size != shape[0] * shape[1]:
            raise EngineError(f"sample {rollout.sample_id}: vLLM gave {ids.size} log-probs for {shape}")
        ids, log_probs = ids.reshape(shape), log_probs.reshape(shape)
        check_finite(rollout.sample_id, log_probs, self._model_dir, self._config.dtype)
        return ids, log_probs

    def _score(
        self, rollout: Rollout, ids: NDArray[np.int32], log_probs: NDArray[np.float32], top_k: int
    ) -> Score:
        """From the token itself, then at least so many likeliest that `top_k` of them have a token."""
        own = log_probs[:, 0].copy()
        if not top_k:
            return Score(rollout.sample_id, own)
        is_token = ~np.isin(ids[:, 1:], self._tokenless)
        kept = np.argsort(~is_token, axis=1, kind="stable")[:, :top_k]
        likeliest = TopK(
            np.take_along_axis(ids[:, 1:], kept, axis=1),
            np.take_along_axis(log_probs[:, 1:], kept, axis=1),
            self._tail(ids, log_probs, kept),
        )
        return Score(rollout.sample_id, own, likeliest)

    def _tail(
        self, ids: NDArray[np.int32], log_probs: NDArray[np.float32], kept: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """float32 [T]: the log of what neither the token itself has nor the top k, `kept` [T, k] of the
        likeliest."""
        probs = np.exp(log_probs.astype(np.float64))
        is_kept = np.zeros(ids[:, 1:].shape, dtype=bool)
        np.put_along_axis(is_kept, kept, True, axis=1)
        is_itself = ids[:, 1:] == ids[:, :1]
        is_among = (is_kept & is_itself).any(axis=1)
        left = (
            1
            - np.take_along_axis(probs[:, 1:], kept, axis=1).sum(axis=1)
            - np.where(is_among, 0, probs[:, 0])
        )
        unseen = self._vocabulary - (ids.shape[1] - 1) - ~is_itself.any(axis=1)
        seen = np.where(is_kept | is_itself, 0, probs[:, 1:]).sum(axis=1)
        with np.errstate(divide="ignore"):  # nothing is unseen, or was seen and not kept
            most = np.logaddexp(np.log(unseen) + log_probs[:, -1].astype(np.float64), np.log(seen))
        tail: NDArray[np.float32] = np.minimum(np.log(np.maximum(left, RESOLUTION)), most).astype(np.float32)
        return np.minimum(tail, np.float32(0))

    def _rollout(
        self, request: Prompted, output: Any, sampling: Sampling, end_tokens: frozenset[int]
    ) -> Rollout:
        tokens = np.array(output.token_ids, dtype=np.int32)
        log_probs = np.array(output.logprobs.logprobs, dtype=np.float32)
        check_finite(request.sample_id, log_probs, self._model_dir, self._config.dtype)
        is_stopped = bool(len(tokens)) and int(tokens[-1]) in end_tokens
        if len(log_probs) != len(tokens) or not (is_stopped or len(tokens) == sampling.max_new_tokens):
            raise EngineError(
                f"sample {request.sample_id}: vLLM ended it ({output.finish_reason}) with {len(tokens)} "
                f"tokens and {len(log_probs)} log-probs: run again with another engine, in another run_dir"
            )
        finish: FinishReason = "stop" if is_stopped else "length"
        return Rollout(request.sample_id, request.prompt_tokens, tokens, finish, log_probs)

    def _run(self, prompts: Sequence[NDArray[np.int32]], parameters: Sequence[Any]) -> list[Any]:
        from vllm import TokensPrompt
        from vllm.v1.engine.exceptions import EngineDeadError

        base = EngineDeadError.__mro__[-4]  # what all of vLLM's errors have below Exception, if anything
        asked = [TokensPrompt(prompt_token_ids=tokens.tolist()) for tokens in prompts]
        try:
            outputs: list[Any] = self._llm.generate(asked, list(parameters), use_tqdm=False)
        except (ValueError, MemoryError, RuntimeError, TimeoutError, base) as error:
            text = f"{self._model_dir}: vLLM failed: {_in_a_line(error)}"
            if is_out_of_memory(error):
                advice = "lower engine.batch_size or engine.vllm.memory_fraction"
                raise EngineError(f"{text}: memory ran out: {advice}") from error
            crashes = RuntimeError, TimeoutError, EngineDeadError  # a worker's end, or of a kernel in it
            raise (EngineDied if isinstance(error, crashes) else EngineError)(text) from error
        return outputs


def _windows(rollouts: Sequence[Rollout], top_k: int) -> Iterator[Sequence[Rollout]]:
    """Consecutive rollouts with at most HELD_LOG_PROBS log-probs, prompts included; at least one."""
    begin, held = 0, 0
    for index, rollout in enumerate(rollouts):
        size = (len(rollout.prompt_tokens) + len(rollout.response_tokens)) * (top_k + 1)
        if held and held + size > HELD_LOG_PROBS:
            yield rollouts[begin:index]
            begin, held = index, 0
        held += size
    if begin < len(rollouts):
        yield rollouts[begin:]


def _overrides(config: EngineConfig) -> dict[str, str] | None:
    """Of the model's own settings: its output layer in fp32, though its others are not."""
    wanted = config.dtype != "fp32" and head_precision(config, "") == "fp32"
    return {"head_dtype": "float32"} if wanted else None


def _batching(sequences: int, longest: int | None) -> dict[str, Any]:
    """How vLLM may fill a step with up to `sequences` of up to `longest` tokens (None: as the model says).

    Where a step has no room for the whole of a prompt, vLLM runs a part of it and winds the sample's
    generator back, which torch's on a CPU cannot do. There it is to run prompts whole, however long, beside a
    token of each other sequence.
    """
    if _has_gpu():
        return {"max_num_batched_tokens": max(BATCHED_TOKENS, sequences), "max_model_len": longest}
    room = None if longest is None else max(BATCHED_TOKENS, longest) + sequences
    return {"max_num_batched_tokens": room, "max_model_len": longest, "enable_chunked_prefill": False}


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _in_a_line(error: BaseException) -> str:
    """What vLLM says, which can be of many lines and have its reason in any of them."""
    text = " ".join((str(error) or type(error).__name__).split())
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}..."
