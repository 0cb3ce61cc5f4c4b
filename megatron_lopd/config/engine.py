"""What runs a model to sample or to score, how, and how far two of them may differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron_lopd.config.keys import (
    Count,
    CountOrZero,
    Positive,
    key,
    named_by,
    options_of,
    require,
    settle_options,
)
from megatron_lopd.registry import ENGINES


@dataclass(frozen=True)
class Fp8Config:
    """Transformer Engine's FP8 in the linear layers; log-probs and master weights stay fp32."""

    recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = key(
        "how scales are found: from earlier steps, by tensor, by block, or in blocks of 32 (Blackwell)"
    )
    format: Literal["e4m3", "hybrid"] | None = key(
        "hybrid: e4m3 forward, e5m2 backward; empty: hybrid for delayed and tensorwise, e4m3 for the others",
        None,
    )
    bf16_first_last_layers: CountOrZero = key("layers kept in bf16 at each end (count; not with delayed)", 0)

    def __post_init__(self) -> None:
        require(
            self.recipe != "delayed" or self.bf16_first_last_layers == 0,
            f"fp8.bf16_first_last_layers={self.bf16_first_last_layers} does not go with fp8.recipe=delayed: "
            "set it to 0, or fp8.recipe to tensorwise or blockwise",
        )

    @property
    def number_format(self) -> Literal["e4m3", "hybrid"]:
        """`format`, or Transformer Engine's default for the recipe: small blocks need no wider exponent."""
        return self.format or ("hybrid" if self.recipe in ("delayed", "tensorwise") else "e4m3")


@dataclass(frozen=True)
class EngineConfig:
    name: str = key("what runs the model", "transformers", door=ENGINES)
    batch_size: Count = key(
        "sequences run together, where the engine does not pack them", 64, operational=True
    )
    dtype: Literal["fp32", "bf16"] = key("compute precision of the engine", "fp32")
    workers: Count = key(
        "processes that share the stage on each machine, its GPUs and cores divided among them (count)",
        1,
        operational=True,
    )
    patience_minutes: Positive = key(
        "minutes without an answer after which the engine counts as hung: it may load a big model for long, "
        "or give all of a shard at its end",
        120.0,
        operational=True,
    )
    shard_samples: Count = key("samples in a shard: what a killed worker can lose at most", 4096)
    trust_remote_code: bool = key("run code that comes with the model", False)
    fp8: Fp8Config | None = key("FP8 layers, of an engine that has them (dtype=bf16); empty: none", None)
    options: Any = options_of("name")  # an EngineOptions

    @property
    def patience_seconds(self) -> float:
        """`patience_minutes`, in seconds."""
        return 60 * self.patience_minutes

    def __post_init__(self) -> None:
        settle_options(self)
        require(
            self.fp8 is None or named_by(self, "name").fp8,
            f"engine.fp8: engine.name={self.name} has no FP8 layers: drop it, or name an engine that has",
        )
        require(
            self.fp8 is None or self.dtype == "bf16",
            "engine.fp8 layers stand among bf16 ones: set engine.dtype=bf16, or drop engine.fp8",
        )
        require(
            self.fp8 is None or self.fp8.recipe != "delayed",
            "engine.fp8.recipe=delayed finds its scales in earlier micro-batches, and scores would depend on "
            "their order: set it to tensorwise or blockwise",
        )


@dataclass(frozen=True)
class AgreementConfig:
    """Tolerances in nats, of |difference| between two engines' log-probs of the same tokens."""

    engine: EngineConfig = key("the second engine, which scores some rollouts too", factory=EngineConfig)
    samples: Count = key("rollouts scored by both, spread evenly over all (count)", 64)
    mean: Positive | None = key(
        "largest mean difference, nats, and half the largest of top-k tokens; empty: by the coarser "
        "precision of the two, 1e-3 for fp32, 0.05 for bf16, 0.2 for fp8",
        None,
    )
    p99: Positive | None = key("what 99 in 100 tokens stay within, nats; empty: 10 times the mean's", None)
    max: Positive | None = key(
        "largest difference of a single token, nats; empty: 100 times the mean's", None
    )
