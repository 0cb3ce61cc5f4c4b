"""Before step 1: does the trainer give the rollouts the log-probs their sampler kept?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from megatron_lopd.config import Sampling
from megatron_lopd.data.collate import MicroBatch
from megatron_lopd.errors import DataError, NumericsError
from megatron_lopd.objectives import KeptLogProbs, Objective, TokenLogProbs
from megatron_lopd.training.metrics import Counts, summarize
from megatron_lopd.training.step import run_micro_batches

if TYPE_CHECKING:
    from megatron_lopd.training.trainer import Trainer

# Mean |trainer - kept|, nats, that rounding may explain. Two fp32 programs differ by 1e-6 to 1e-4 (seen in
# tests and with SmolLM2). A bf16 factor keeps 8 bits: against fp32, 0.0085 seen in a tiny random model, and
# in SmolLM2-135M 0.026 on plain text and 0.031 on its own samples. e4m3 keeps 4: with weights and inputs
# rounded so, on a CPU, 0.10 in that tiny model and 0.21 in SmolLM2-135M on plain text; larger models and a
# student's own tokens should be nearer: tensorwise on an H200, 0.062 in a random 0.6B on its own samples.
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
    metric_names: tuple[str, ...] = ("p99", "max")

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


def check_rollouts(trainer: Trainer, micro_batches: Sequence[MicroBatch], causes: str) -> None:
    """Forward this rank's `micro_batches`: the trainer's log-probs against the sampling model's own.

    Every rank calls alike; nothing is checked of a job without a preflight. Raises NumericsError, which names
    the likely `causes`, when they disagree.
    """
    preflight = trainer.job.preflight
    if preflight is None:
        return
    count = Counts.of(micro_batches, trainer.device).samples
    measured = _measure(trainer, micro_batches)
    difference = measured["loss"]
    spread = f"99% of tokens within {measured['p99']:.2g}, the largest {measured['max']:.2g}"
    if not difference <= preflight.tolerance:  # so that NaN fails
        raise NumericsError(
            f"preflight: over {count} rollouts the trainer's log-probs differ from the kept behaviour "
            f"log-probs by {difference:.4g} nats on average ({spread}), above the tolerance of "
            f"{preflight.tolerance:g}: likely causes are {causes}"
        )
    trainer.note(
        f"preflight: {count} rollouts agree with the trainer within {difference:.2g} nats on average "
        f"({spread}; tolerance {preflight.tolerance:g})"
    )


def _measure(trainer: Trainer, micro_batches: Sequence[MicroBatch]) -> dict[str, float]:
    """loss, p99 and max of the differences, alike on every rank."""
    agreement, chunks, device = Agreement(), trainer.optimization.chunks, trainer.device
    for chunk in chunks:
        chunk.eval()  # recomputed layers would stack up FP8 scales for a backward that never comes
    with torch.no_grad():
        parts = run_micro_batches(
            chunks,
            agreement,
            micro_batches,
            trainer.job.config.micro_batch_tokens,
            device,
            forward_only=True,
        )
    for chunk in chunks:
        chunk.train()
    return summarize(parts, Counts.of(micro_batches, device), agreement, trainer.ranks, device)
