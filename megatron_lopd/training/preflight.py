"""Before step 1: does the trainer give the rollouts the log-probs their sampler kept?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from megatron_lopd.config import Sampling
from megatron_lopd.data.collate import MicroBatch
from megatron_lopd.data.dataset import TrainingData
from megatron_lopd.errors import DataError, NumericsError
from megatron_lopd.mcore.loader import BatchLoader
from megatron_lopd.mcore.process_groups import Ranks
from megatron_lopd.objectives import KeptLogProbs, Objective, TokenLogProbs
from megatron_lopd.training.metrics import Counts, summarize
from megatron_lopd.training.step import run_micro_batches

# Mean |trainer - kept|, nats, that rounding may explain. Two fp32 programs differ by 1e-6 to 1e-4 (seen in
# tests and with SmolLM2). A bf16 factor keeps 8 bits: against fp32, 0.0085 seen in a tiny random model, and
# in SmolLM2-135M 0.026 on plain text and 0.031 on its own samples. e4m3 keeps 4: with weights and inputs
# rounded so, on a CPU, 0.10 in that tiny model and 0.21 in SmolLM2-135M on plain text; larger models and a
# student's own tokens should be nearer, and on a GPU it has not been looked at.
TOLERANCES = {"fp32": 1e-3, "bf16": 0.05, "fp8": 0.2}


@dataclass(frozen=True)
class Preflight:
    """`samples` rollouts must agree within a mean of `tolerance` nats; `sampling` is how they were drawn."""

    samples: int
    tolerance: float
    sampling: Sampling


@dataclass(frozen=True)
class Spread:
    """Of |differences| of log-probs, nats: their mean, what 99 in 100 do not exceed, and the largest."""

    mean: float
    p99: float
    max: float

    @staticmethod
    def of(differences: Tensor) -> Spread:
        """`differences` [R], R >= 1, of either sign."""
        ordered = differences.abs().sort().values  # torch.quantile refuses 2^24 values
        p99 = ordered[math.ceil(0.99 * len(ordered)) - 1]
        return Spread(ordered.double().mean().item(), p99.item(), ordered[-1].item())


# What a disagreement comes from, and what to do.
CACHED_CAUSES = (
    "a checkpoint other than the one that sampled, another chat template or tokenizer, log-probs shifted by "
    "one token, or a precision far from the sampler's: roll out again from this checkpoint, or raise "
    "train.preflight_tolerance if only the precision differs"
)
LIVE_CAUSES = (
    "a precision far from the sampler's (raise train.preflight_tolerance if so), or a model whose two "
    "implementations compute something else"
)


class Agreement(Objective):
    """An objective whose loss is `|log pi_theta - log pi_behaviour|` of each token."""

    needs: ClassVar[tuple[KeptLogProbs, ...]] = ("behaviour",)
    metric_names: ClassVar[tuple[str, ...]] = ("p99", "max")

    def token_loss(self, tokens: TokenLogProbs) -> Tensor:
        if tokens.behaviour is None:
            raise DataError(
                "the rollouts hold no behaviour log-probs to check the trainer against: sample them again, "
                "or set train.preflight_samples=0"
            )
        return (tokens.current - tokens.behaviour).abs()

    def metrics(self, tokens: TokenLogProbs, loss: Tensor) -> dict[str, float]:
        """Of all tokens: the difference that 99 in 100 do not exceed, and the largest one."""
        spread = Spread.of(loss)
        return {"p99": spread.p99, "max": spread.max}


@dataclass(frozen=True)
class PreflightCheck:
    """The trainer, ready to be held to `preflight`; every rank calls alike. `note` tells the outcome."""

    preflight: Preflight
    chunks: Sequence[torch.nn.Module]
    loader: BatchLoader
    ranks: Ranks
    device: torch.device
    note: Callable[[str], None]

    def check_cached(self, data: TrainingData) -> None:
        """`check` samples spread evenly over the data; leave it out where they keep nothing to compare."""
        if not data.keeps_behaviour(self.preflight.sampling):
            self.note(
                "preflight left out: an earlier release kept of these rollouts what temperature, top-p and "
                "top-k made of the model's log-probs, and not its own: drift is measured against that, too"
            )
            return
        size = len(data)
        count = min(self.preflight.samples, size)
        positions = [int(position) for position in np.linspace(0, size - 1, count)]
        self.check(self.loader.micro_batches(positions), CACHED_CAUSES)

    def check(self, micro_batches: Sequence[MicroBatch], causes: str) -> None:
        """Forward this rank's `micro_batches`: the trainer's log-probs against the sampling model's own.

        Raises NumericsError, which names the likely `causes`, when they disagree.
        """
        tolerance = self.preflight.tolerance
        count = Counts.of(micro_batches, self.device).samples
        measured = self._measure(micro_batches)
        difference = measured["loss"]
        spread = f"99% of tokens within {measured['p99']:.2g}, the largest {measured['max']:.2g}"
        if not difference <= tolerance:  # so that NaN fails
            raise NumericsError(
                f"preflight: over {count} rollouts the trainer's log-probs differ from the kept behaviour "
                f"log-probs by {difference:.4g} nats on average ({spread}), above the tolerance of "
                f"{tolerance:g}: likely causes are {causes}"
            )
        self.note(
            f"preflight: {count} rollouts agree with the trainer within {difference:.2g} nats on average "
            f"({spread}; tolerance {tolerance:g})"
        )

    def _measure(self, micro_batches: Sequence[MicroBatch]) -> dict[str, float]:
        """loss, p99 and max of the differences, alike on every rank."""
        agreement = Agreement()

        for chunk in self.chunks:
            chunk.eval()  # recomputed layers would stack up FP8 scales for a backward that never comes
        with torch.no_grad():
            parts = run_micro_batches(
                self.chunks,
                agreement,
                micro_batches,
                self.loader.config.micro_batch_tokens,
                self.device,
                forward_only=True,
            )
        for chunk in self.chunks:
            chunk.train()
        return summarize(parts, Counts.of(micro_batches, self.device), agreement, self.ranks, self.device)
