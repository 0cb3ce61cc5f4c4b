"""The records that travel between stages: a sampled response, and a teacher's score of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Rollout:
    """One sampled response, exactly as the sampler produced it (DESIGN section 5).

    `prompt_tokens` int32 [P]; `response_tokens` int32 [T], T >= 1, INCLUDING the end token when
    `finish_reason` is "stop"; `log_probs` float32 [T], nats, of the sampler's own distribution
    (temperature, top-p and top-k applied). Responses that were not sampled (SFT text) have
    `log_probs` None.
    """

    sample_id: str
    prompt_tokens: NDArray[np.int32]
    response_tokens: NDArray[np.int32]
    finish_reason: FinishReason
    log_probs: NDArray[np.float32] | None


@dataclass(frozen=True)
class Score:
    """A teacher's `log pi_T(a_t | s_t)` of one rollout's response: float32 [T], nats, temperature 1."""

    sample_id: str
    log_probs: NDArray[np.float32]


@dataclass(frozen=True)
class Sample:
    """What the trainer reads of one sample: the rollout and, for OPD, its teacher log-probs."""

    rollout: Rollout
    teacher_log_probs: NDArray[np.float32] | None
