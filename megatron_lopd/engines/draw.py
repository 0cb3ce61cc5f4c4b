"""Drawing tokens from logits, each sample from a random stream of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_lopd.config import Sampling

# Draws made at a time for a sample: enough to make a call's overhead small, few enough to hold for a batch.
BLOCK = 256


def uniforms(seeds: Sequence[int], block: int) -> Tensor:
    """Draws `block * BLOCK` to `(block + 1) * BLOCK - 1` of each seed's stream: float64 [B, BLOCK] in (0, 1].

    The stream is counter-based (Philox keyed by the seed), so draw t of a sample does not depend on what
    else is in the batch. Raw words are used since numpy keeps them stable across versions.
    """
    words_per_count = 4
    words = [
        np.random.Philox(key=seed, counter=block * BLOCK // words_per_count).random_raw(BLOCK)
        for seed in seeds
    ]
    return torch.from_numpy(((np.stack(words) >> np.uint64(11)) + 1.0) * 2.0**-53)


def truncated_log_probs(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that is sampled from: float64 log-probs [B, V], nats, -inf for what is cut off.

    Temperature, then top-k, then top-p on what top-k left, as in transformers; what is kept is renormalised.
    Tokens tied with the last one kept are kept.
    """
    log_probs = torch.log_softmax(logits.double() / sampling.temperature, dim=-1)
    if 0 < sampling.top_k < log_probs.shape[-1]:
        smallest = log_probs.topk(sampling.top_k, dim=-1).values[:, -1:]  # [B, 1]
        log_probs = log_probs.masked_fill(log_probs < smallest, -torch.inf).log_softmax(dim=-1)
    if sampling.top_p < 1:
        ranked = log_probs.sort(dim=-1, descending=True).values
        mass_before = ranked.exp().cumsum(dim=-1) - ranked.exp()
        smallest = ranked.masked_fill(mass_before >= sampling.top_p, torch.inf).amin(dim=-1, keepdim=True)
        log_probs = log_probs.masked_fill(log_probs < smallest, -torch.inf).log_softmax(dim=-1)
    return log_probs


def draw(
    logits: Tensor, sampling: Sampling, uniform: Tensor, tokenless: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token a row by inverting the distribution's CDF at `uniform` (float64 [B], in (0, 1]).

    `logits` float32 [B, V]; `tokenless` int64 [n] are ids that are never drawn. Returns tokens int64 [B] and
    their log-probs float32 [kinds, B]: where tokens are drawn from `softmax(logits)` itself
    (Sampling.is_plain) under that, whatever share of it the tokenless have; else under `truncated_log_probs`
    without these, and under `softmax(logits)`. At temperature 0 the token is the most likely one and the
    log-prob that of temperature 1: the sampler's own would be 0 everywhere, and tell nothing. Logits that are
    not finite give a log-prob that is not finite.
    """
    speakable = logits if tokenless is None else logits.index_fill(-1, tokenless, -torch.inf)
    if sampling.temperature == 0:
        log_probs = torch.log_softmax(logits.double(), dim=-1)
        tokens = speakable.argmax(dim=-1)
    else:
        log_probs = truncated_log_probs(speakable, sampling)
        cdf = log_probs.exp().cumsum(dim=-1)
        # The first token whose CDF reaches a target in (0, total]: it exists, and has probability above 0.
        target = uniform[:, None] * cdf[:, -1:]
        # A row of NaN has no such token; staying in range lets the caller see and name it.
        tokens = torch.searchsorted(cdf, target).squeeze(-1).clamp(max=cdf.shape[-1] - 1)
    own = (
        [torch.log_softmax(logits.double(), dim=-1)] if tokenless is not None or not sampling.is_plain else []
    )
    kept = (own or [log_probs]) if sampling.is_plain else [log_probs, *own]
    return tokens, torch.stack([each.gather(-1, tokens[:, None]).squeeze(-1) for each in kept]).float()
