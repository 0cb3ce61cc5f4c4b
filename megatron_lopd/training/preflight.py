"""Before step 1: does the trainer give the rollouts the log-probs their sampler kept?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_lopd.config import Sampling
from megatron_lopd.errors import DataError, NumericsError
from megatron_lopd.mcore.parallel import Ranks
from megatron_lopd.objectives import KeptLogProbs, TokenLogProbs
from megatron_lopd.training.metrics import Counts, summarize
from megatron_lopd.training.step import BatchLoader, run_micro_batches


@dataclass(frozen=True)
class Preflight:
    """`samples` rollouts must agree within a mean of `tolerance` nats; `sampling` is how they were drawn."""

    samples: int
    tolerance: float
    sampling: Sampling


class Agreement:
    """An objective whose loss is `|log pi_theta - log pi_behaviour|` of each token."""

    needs: tuple[KeptLogProbs, ...] = ("behaviour",)
    metric_names: tuple[str, ...] = ()

    def token_loss(self, tokens: TokenLogProbs) -> Tensor:
        if tokens.behaviour is None:
            raise DataError(
                "the rollouts hold no behaviour log-probs to check the trainer against: sample them again, "
                "or set train.preflight_samples=0"
            )
        return (tokens.current - tokens.behaviour).abs()

    def metrics(self, tokens: TokenLogProbs, loss: Tensor) -> dict[str, float]:
        return {}


def check_rollouts(
    preflight: Preflight,
    chunks: Sequence[torch.nn.Module],
    loader: BatchLoader,
    ranks: Ranks,
    device: torch.device,
    note: Callable[[str], None],
) -> None:
    """Forward samples spread evenly over the data; every rank calls. `note` tells the outcome.

    The kept log-probs are at the sampler's temperature (1 where it was greedy), so the trainer's are
    taken at it too. Top-p and top-k renormalise over sets of tokens that were not kept: then nothing is
    compared, and `note` says so. Raises NumericsError when they disagree.
    """
    sampling = preflight.sampling
    if sampling.top_p < 1 or sampling.top_k > 0:
        note(
            "preflight left out: log-probs kept under top-p or top-k are of a truncated distribution and "
            "cannot be compared with the trainer's"
        )
        return
    size = len(loader.data)
    count = min(preflight.samples, size)
    positions = [int(position) for position in np.linspace(0, size - 1, count)]
    micro_batches = loader.micro_batches(positions)
    parts = run_micro_batches(
        chunks,
        Agreement(),
        micro_batches,
        loader.config.micro_batch_tokens,
        device,
        forward_only=True,
        temperature=sampling.temperature or 1.0,
    )
    difference = summarize(parts, Counts.of(micro_batches, device), Agreement(), ranks, device)["loss"]
    if not difference <= preflight.tolerance:  # so that NaN fails
        raise NumericsError(
            f"preflight: over {count} rollouts the trainer's log-probs differ from the kept behaviour "
            f"log-probs by {difference:.4g} nats on average, above the tolerance of {preflight.tolerance:g}: "
            "likely causes are a checkpoint other than the one that sampled, another chat template or "
            "tokenizer, log-probs shifted by one token, or a precision far from the sampler's: roll out "
            "again from this checkpoint, or raise train.preflight_tolerance if only the precision differs"
        )
    note(f"preflight: {count} rollouts agree with the trainer within {difference:.2g} nats on average")
