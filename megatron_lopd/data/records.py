"""The records that travel between stages: a sampled response, and a teacher's score of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Rollout:
    """One sampled response, exactly as the sampler produced it.

    `prompt_tokens` int32 [P]; `response_tokens` int32 [T], T >= 1, INCLUDING the end token when
    `finish_reason` is "stop"; `log_probs` float32 [T], nats, of the distribution that the tokens were drawn
    from (temperature, top-p and top-k applied). `untruncated_log_probs` float32 [T], nats:
    `log pi_ref(a_t | s_t)`, at temperature 1 over the whole vocabulary; None where it is the same
    (Sampling.is_plain), and in rollouts from before it was kept. Responses that were not sampled (SFT text)
    have neither.
    """

    sample_id: str
    prompt_tokens: NDArray[np.int32]
    response_tokens: NDArray[np.int32]
    finish_reason: FinishReason
    log_probs: NDArray[np.float32] | None
    untruncated_log_probs: NDArray[np.float32] | None = None

    @property
    def behaviour_log_probs(self) -> NDArray[np.float32] | None:
        """`log pi_ref(a_t | s_t)`, the model's own, float32 [T]."""
        return self.log_probs if self.untruncated_log_probs is None else self.untruncated_log_probs


@dataclass(frozen=True)
class TopK:
    """The teacher's k likeliest tokens after each prefix of a response, at temperature 1.

    `ids` int32 [T, k], likeliest first; `log_probs` float32 [T, k], nats; `tail_log_probs` float32 [T],
    nats: the log of the mass of all tokens that are neither among the k nor the response token itself.
    """

    ids: NDArray[np.int32]
    log_probs: NDArray[np.float32]
    tail_log_probs: NDArray[np.float32]


@dataclass(frozen=True)
class Score:
    """What a teacher said of one rollout.

    `log_probs` float32 [T], nats: `log pi_T(a_t | s_t)` at temperature 1, exact whether or not a_t is among
    the top k. `top_k` None where only the response tokens were scored.
    """

    sample_id: str
    log_probs: NDArray[np.float32]
    top_k: TopK | None = None


@dataclass(frozen=True)
class Sample:
    """What the trainer reads of one sample: the rollout and, for OPD, its teacher's score."""

    rollout: Rollout
    score: Score | None
