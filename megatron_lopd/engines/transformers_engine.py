"""The `transformers` engine: a Hugging Face model in this process, on the GPU if there is one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from megatron_lopd.config import EngineConfig, Sampling
from megatron_lopd.data.records import Rollout, Score, TopK
from megatron_lopd.engines.draw import BLOCK, draw, uniforms
from megatron_lopd.engines.protocol import Prompted
from megatron_lopd.engines.requests import (
    check_finite,
    check_scoring,
    check_tokens,
    give_back_memory,
    memory_advice,
    tokenless_ids,
    windows,
)
from megatron_lopd.errors import EngineError, LopdError, reason_of
from megatron_lopd.ops.products import matmul_fp32

# Elements of a [tokens, vocabulary] block of logits: 128 MB in fp32, and 220 tokens of a vocabulary of 152 k.
LOGITS_ELEMENTS = 1 << 25

# Finished rows leave the batch once this share of it is still running: leaving costs a copy of the cache.
COMPACT_BELOW = 0.75

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TransformersEngine:
    """Batched generation with a KV cache, and scoring. See `Engine` for what the methods return.

    Logits are computed in fp32 from the last hidden state whatever the model's dtype: rounded to bf16
    they would cost up to 1e-1 nats a token. Raises EngineError when the model does not load whole.
    """

    def __init__(self, config: EngineConfig, model_dir: str) -> None:
        self._config = config
        self._model_dir = model_dir
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with self._memory_advice("engine.dtype=bf16 halves what the weights need"):
            model = _load_model(config, model_dir).to(self._device).eval()
        head = model.get_output_embeddings()
        self._head = head
        self._decoder = model.base_model
        self._weights = _checkpoint_weights(model)
        self._head_weight = _head_weight(head.weight.detach(), self._device)  # [V, h]
        self._head_bias = None if head.bias is None else head.bias.detach().float()
        self._model_config = model.config
        self._positions: int | None = getattr(model.config, "max_position_embeddings", None)
        tokenless = tokenless_ids(config, model_dir, len(head.weight))
        self._tokens = len(head.weight) - len(tokenless)
        self._tokenless = torch.from_numpy(tokenless).to(self._device) if len(tokenless) else None
        self._check_head(model)

    def generate(
        self, requests: Sequence[Prompted], sampling: Sampling, end_tokens: frozenset[int]
    ) -> Iterator[Rollout]:
        """Sample one response a request, batch by batch in order.

        At temperature 0 the log-probs are those of temperature 1 (see `draw`). Raises EngineError
        naming the sample for a token beyond the vocabulary, more tokens than the model has positions for, and
        logits that are not finite; and when memory runs out.
        """
        for request in requests:
            check_tokens(
                request.sample_id,
                request.prompt_tokens,
                sampling.max_new_tokens,
                len(self._head_weight),
                self._positions,
                self._model_dir,
            )
        advice = "lower engine.batch_size (or sampling.max_new_tokens, in another run_dir)"
        for start in range(0, len(requests), self._config.batch_size):
            with self._memory_advice(advice):
                batch = requests[start : start + self._config.batch_size]
                rollouts = self._generate_batch(batch, sampling, sorted(end_tokens))
            yield from rollouts

    def score(self, rollouts: Sequence[Rollout], top_k: int = 0) -> Iterator[Score]:
        """Scores of given responses, run together by length, the longest first. Raises as `generate`."""
        rows = len(self._head_weight)
        check_scoring(rollouts, top_k, rows, self._tokens, self._positions, self._model_dir)
        return (
            score
            for window in windows(rollouts, top_k, self._config.batch_size)
            for score in self._score_window(window, top_k)
        )

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See `Engine.load_weights`."""
        missing = set(self._weights)
        for name, values in weights:
            weight = self._weights.get(name)
            if weight is None:
                raise EngineError(f"{self._model_dir}: weight {name} is given, and the model has none such")
            if weight.shape != values.shape:
                raise EngineError(
                    f"{self._model_dir}: weight {name} is given as {tuple(values.shape)}, and the model's is "
                    f"{tuple(weight.shape)}"
                )
            weight.copy_(values)
            missing.discard(name)
        if missing:
            raise EngineError(
                f"{self._model_dir}: {len(missing)} weights are not given, the first is {min(missing)}"
            )
        if self._head_weight.dtype != self._head.weight.dtype:  # then it is a copy
            self._head_weight.copy_(self._head.weight)
            if self._head_bias is not None:
                self._head_bias.copy_(self._head.bias)

    def close(self) -> None:
        """Drop the model, whoever still holds the engine, and give back its memory."""
        vars(self).clear()
        give_back_memory()

    def _score_window(self, rollouts: Sequence[Rollout], top_k: int) -> list[Score]:
        lengths = [len(rollout.prompt_tokens) + len(rollout.response_tokens) for rollout in rollouts]
        longest_first = sorted(range(len(rollouts)), key=lambda index: -lengths[index])
        results: dict[int, Score] = {}
        for start in range(0, len(rollouts), self._config.batch_size):
            chosen = longest_first[start : start + self._config.batch_size]
            with self._memory_advice("lower engine.batch_size"):
                scored = self._score_batch([rollouts[index] for index in chosen], top_k)
            results.update(zip(chosen, scored, strict=True))
        return [results[index] for index in range(len(rollouts))]

    @torch.inference_mode()
    def _generate_batch(
        self, requests: Sequence[Prompted], sampling: Sampling, end_tokens: list[int]
    ) -> list[Rollout]:
        ends = torch.tensor(end_tokens, dtype=torch.int64, device=self._device)
        tokens, mask = self._left_padded(requests, sampling.max_new_tokens)
        prompt_length = tokens.shape[1]
        position = (mask[:, :prompt_length].cumsum(-1) - 1).clamp(min=0)
        is_padded = not bool(mask.all())
        cache = DynamicCache(config=self._model_config)

        # Rows of the batch still running, by request; and what each request has got so far.
        rows = torch.arange(len(requests), device=self._device)
        shape = len(requests), sampling.max_new_tokens
        responses = torch.zeros(shape, dtype=torch.int64, device=self._device)
        kinds = 1 if sampling.is_plain else 2  # of log-probs that `draw` gives
        log_probs = torch.zeros((kinds, *shape), dtype=torch.float32, device=self._device)
        lengths = torch.full((len(requests),), sampling.max_new_tokens, device=self._device)
        stopped = torch.zeros(len(requests), dtype=torch.bool, device=self._device)
        for step in range(sampling.max_new_tokens):
            if step % BLOCK == 0:
                seeds = [requests[row].seed for row in rows.tolist()]
                uniform = uniforms(seeds, step // BLOCK).to(self._device)
            seen = mask[:, : prompt_length + step] if is_padded else None
            hidden = self._hidden(tokens, attention_mask=seen, position_ids=position, past_key_values=cache)
            sampled, sampled_log_probs = self._draw(hidden[:, -1], sampling, uniform[:, step % BLOCK])
            responses[rows, step] = sampled
            log_probs[:, rows, step] = sampled_log_probs

            ended = torch.isin(sampled, ends) & ~stopped[rows]
            lengths[rows[ended]] = step + 1
            stopped[rows[ended]] = True
            running = (~stopped[rows]).nonzero().squeeze(-1)
            if not len(running):
                break
            tokens, position = sampled[:, None], position[:, -1:] + 1
            if len(running) <= COMPACT_BELOW * len(rows):
                cache.batch_select_indices(running)
                rows, tokens, position = rows[running], tokens[running], position[running]
                mask, uniform = mask[running], uniform[running]
        return self._rollouts(requests, responses, log_probs, lengths, stopped)

    @torch.inference_mode()
    def _score_batch(self, rollouts: Sequence[Rollout], top_k: int) -> list[Score]:
        # The last token predicts nothing that is asked for, so it is not run. Padding comes after the tokens,
        # which a causal model does not see, so there is no mask.
        inputs = [np.concatenate([r.prompt_tokens, r.response_tokens[:-1]]) for r in rollouts]
        tokens = np.zeros((len(inputs), max(map(len, inputs))), dtype=np.int64)
        for row, values in enumerate(inputs):
            tokens[row, : len(values)] = values
        hidden = self._hidden(torch.from_numpy(tokens).to(self._device))  # [B, L, h]

        # The position before a response token predicts it; all responses end to end: [R].
        lengths = [len(r.response_tokens) for r in rollouts]
        row_index = np.repeat(np.arange(len(rollouts)), lengths)
        position = np.concatenate(
            [len(r.prompt_tokens) - 1 + np.arange(len(r.response_tokens)) for r in rollouts]
        )
        targets = np.concatenate([r.response_tokens for r in rollouts]).astype(np.int64)
        hidden = hidden[torch.from_numpy(row_index), torch.from_numpy(position)]  # [R, h]
        parts = [
            torch.split(values, lengths)
            for values in self._token_scores(hidden, torch.from_numpy(targets).to(self._device), top_k)
        ]
        scores = []
        for rollout, part in zip(rollouts, zip(*parts, strict=True), strict=True):
            log_probs, *likeliest = (each.cpu().numpy() for each in part)
            for values in (log_probs, *likeliest[1:]):
                check_finite(rollout.sample_id, values, self._model_dir, self._config.dtype)
            scores.append(Score(rollout.sample_id, log_probs, TopK(*likeliest) if top_k else None))
        return scores

    def _token_scores(self, hidden: Tensor, targets: Tensor, top_k: int) -> list[Tensor]:
        """A Score's tensors, from `hidden` [R, h] and `targets` [R], a block of rows at a time.

        `log softmax(logits)[target]` [R]; with `top_k` also int32 ids [R, k], their log-probs [R, k] and the
        tail's [R].
        """
        blocks = []
        for start in range(0, len(targets), self._rows_at_a_time()):
            rows = slice(start, start + self._rows_at_a_time())
            logits, chosen = self._logits(hidden[rows]), targets[rows, None]
            # No rounding makes these positive: a log-sum-exp is the largest logit plus the log of a sum >= 1.
            total = logits.logsumexp(dim=-1, keepdim=True)
            block = [(logits.gather(-1, chosen) - total).squeeze(-1)]
            if top_k:
                likely = (
                    logits if self._tokenless is None else logits.index_fill(-1, self._tokenless, -torch.inf)
                )
                values, ids = likely.topk(top_k, dim=-1)
                # Summed over the tail itself: 1 minus the rest would be rounding where the rest is nearly 1.
                tail = logits.scatter_(-1, torch.cat([ids, chosen], dim=-1), -torch.inf)
                # Rounding can put a tail that is nearly everything above the whole.
                tail_log_probs = (tail.logsumexp(dim=-1, keepdim=True) - total).clamp(max=0.0)
                block += [ids.int(), values - total, tail_log_probs.squeeze(-1)]
            blocks.append(block)
        return [torch.cat(parts) for parts in zip(*blocks, strict=True)]

    def _draw(self, hidden: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """`draw` from the last hidden states [B, h], a block of rows at a time."""
        rows = self._rows_at_a_time()
        parts = [
            draw(self._logits(states), sampling, draws, self._tokenless)
            for states, draws in zip(torch.split(hidden, rows), torch.split(uniform, rows), strict=True)
        ]
        tokens, log_probs = zip(*parts, strict=True)
        return torch.cat(tokens), torch.cat(log_probs, dim=-1)

    def _rows_at_a_time(self) -> int:
        return max(1, LOGITS_ELEMENTS // len(self._head_weight))

    def _hidden(self, tokens: Tensor, **inputs: Any) -> Tensor:
        """The last hidden states, after the final norm: [B, L, h]."""
        hidden: Tensor = self._decoder(
            input_ids=tokens, use_cache="past_key_values" in inputs, **inputs
        ).last_hidden_state
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        """float32 logits [..., V]."""
        if self._head_weight.dtype == torch.float32:
            return F.linear(hidden.float(), self._head_weight, self._head_bias)
        logits = matmul_fp32(hidden.flatten(0, -2), self._head_weight.t()).view(*hidden.shape[:-1], -1)
        return logits if self._head_bias is None else logits.add_(self._head_bias)

    def _left_padded(self, requests: Sequence[Prompted], max_new_tokens: int) -> tuple[Tensor, Tensor]:
        """Prompts int64 [B, P], and an attention mask for all that will follow: int64 [B, P + max_new]."""
        longest = max(len(request.prompt_tokens) for request in requests)
        tokens = np.zeros((len(requests), longest), dtype=np.int64)
        mask = np.ones((len(requests), longest + max_new_tokens), dtype=np.int64)
        for row, request in enumerate(requests):
            padding = longest - len(request.prompt_tokens)
            tokens[row, padding:] = request.prompt_tokens
            mask[row, :padding] = 0
        return torch.from_numpy(tokens).to(self._device), torch.from_numpy(mask).to(self._device)

    def _rollouts(
        self,
        requests: Sequence[Prompted],
        responses: Tensor,
        log_probs: Tensor,
        lengths: Tensor,
        stopped: Tensor,
    ) -> list[Rollout]:
        """Cut rows of [B, max_new_tokens] to their responses."""
        rollouts = []
        all_tokens, all_log_probs = responses.cpu().numpy().astype(np.int32), log_probs.cpu().numpy()
        for row, request in enumerate(requests):
            length = int(lengths[row])
            kept = [each[row, :length].copy() for each in all_log_probs]
            for values in kept:
                check_finite(request.sample_id, values, self._model_dir, self._config.dtype)
            rollouts.append(
                Rollout(
                    request.sample_id,
                    request.prompt_tokens,
                    all_tokens[row, :length].copy(),
                    "stop" if stopped[row] else "length",
                    *kept,
                )
            )
        return rollouts

    def _check_head(self, model: Any) -> None:
        """Refuse a model that does more to its logits than the output layer: scaling, or soft caps."""
        tokens = torch.arange(min(8, len(self._head_weight)), device=self._device)[None]
        with torch.inference_mode():
            expected = model(input_ids=tokens).logits.float()
            error = (self._logits(self._hidden(tokens)) - expected).abs().max()
        # What the model's own logits lose to its dtype; in fp32, what the order of a sum does.
        tolerance = max(2 * torch.finfo(DTYPES[self._config.dtype]).eps, 1e-4) * expected.abs().max()
        if not error <= tolerance:
            raise EngineError(
                f"{self._model_dir}: {self._model_config.model_type} changes its logits after the output "
                f"layer (by up to {float(error):.3g}), which the transformers engine does not do"
            )

    def _memory_advice(self, advice: str) -> AbstractContextManager[None]:
        setting = f"engine.batch_size={self._config.batch_size}"
        return memory_advice(self._model_dir, self._device, setting, advice)


def _head_weight(weight: Tensor, device: torch.device) -> Tensor:
    """The output layer's weight as `_logits` multiplies it; shared with the model where it can be.

    A GPU's bf16 products are exact, and added up and given in fp32; a CPU has none such, so there it is a
    copy in fp32.
    """
    return weight if device.type == "cuda" else weight.float()


def _load_model(config: EngineConfig, model_dir: str) -> Any:
    """The causal language model with every weight from safetensors: none made up, none from a pickle."""
    if not Path(model_dir, "config.json").is_file():
        raise EngineError(f"{model_dir}: not a Hugging Face checkpoint: there is no config.json")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # its report of what is missing, said below in a line
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype=DTYPES[config.dtype],
            attn_implementation="sdpa",
            trust_remote_code=config.trust_remote_code,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that they are reported below, in one line
            output_loading_info=True,
        )
    except (LopdError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a foreign file has the loader stumble over
        raise EngineError(f"{model_dir}: the model does not load: {reason_of(error)}") from error
    # transformers makes up what it does not find, and says so in a warning.
    for problem in ("missing_keys", "mismatched_keys"):
        if found := sorted(map(str, info[problem])):
            what = problem.removesuffix("_keys")
            raise EngineError(f"{model_dir}: {len(found)} weights are {what}, the first is {found[0]}")
    return model


def _checkpoint_weights(model: Any) -> dict[str, Tensor]:
    """The model's weights by their names in a checkpoint, where each expert has tensors of its own."""
    weights: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        prefix, _, kind = name.rpartition(".mlp.experts.")
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(kind, ())
        if not prefix or not parts:
            weights[name] = weight.detach()
            continue
        for expert, stacked in enumerate(weight.detach()):
            for part, values in zip(parts, stacked.chunk(len(parts)), strict=True):
                weights[f"{prefix}.mlp.experts.{expert}.{part}.weight"] = values
    return weights
