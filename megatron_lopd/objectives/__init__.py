"""The losses on plain tensors. Knows nothing of Megatron-Core.

An objective turns log-probs of the response tokens into a loss per token, and the same log-probs of
a whole global batch into the step's metrics. R = response tokens; a tensor is float [R], nats, unless said.
"""

from __future__ import annotations

from megatron_lopd.config import TrainConfig, TrainingConfig
from megatron_lopd.objectives.advantages import advantages
from megatron_lopd.objectives.distillation import Distillation
from megatron_lopd.objectives.drift import drift
from megatron_lopd.objectives.fixed_negative import FixedNegative
from megatron_lopd.objectives.likelihood import Sft
from megatron_lopd.objectives.objective import (
    KeptLogProbs,
    Objective,
    TokenLogProbs,
    TokenPlaces,
    TopKLogProbs,
)
from megatron_lopd.objectives.sampled_reverse_kl import SampledReverseKl, SampledReverseKlOptions
from megatron_lopd.objectives.topk_forward_kl import TopKForwardKl
from megatron_lopd.objectives.topk_reverse_kl import TopKReverseKl, TopKReverseKlOptions
from megatron_lopd.registry import OBJECTIVES

__all__ = [
    "Distillation",
    "FixedNegative",
    "KeptLogProbs",
    "Objective",
    "SampledReverseKl",
    "SampledReverseKlOptions",
    "Sft",
    "TokenLogProbs",
    "TokenPlaces",
    "TopKForwardKl",
    "TopKLogProbs",
    "TopKReverseKl",
    "TopKReverseKlOptions",
    "advantages",
    "drift",
    "get_objective",
]

# What train.objective may be; the sft stage has Sft, and no other.
OBJECTIVES.add(SampledReverseKl, TopKReverseKl, TopKForwardKl, FixedNegative)


def get_objective(name: str, config: TrainingConfig | None = None) -> Objective:
    """The objective of that name, with `config`'s options and weights where it is a TrainConfig.

    Raises ConfigError naming the known ones otherwise.
    """
    kind: type[Objective] = Sft if name == Sft.name else OBJECTIVES[name]
    if not isinstance(config, TrainConfig):
        return kind()
    return kind(config.options, config.weights)
