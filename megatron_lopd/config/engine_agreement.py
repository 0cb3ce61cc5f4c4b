"""How far two engines may differ before scores are refused."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lopd.config.engine import EngineConfig
from megatron_lopd.config.keys import key, require


@dataclass(frozen=True)
class AgreementConfig:
    """Tolerances in nats, of |difference| between two engines' log-probs of the same tokens."""

    engine: EngineConfig = key("the second engine, which scores some rollouts too", factory=EngineConfig)
    samples: int = key("rollouts scored by both, spread evenly over all (count)", 64)
    mean: float | None = key(
        "largest mean difference, nats, and half the largest of top-k tokens; empty: by the coarser "
        "precision of the two, 1e-3 for fp32, 0.05 for bf16, 0.2 for fp8",
        None,
    )
    p99: float | None = key("what 99 in 100 tokens stay within, nats; empty: 10 times the mean's", None)
    max: float | None = key("largest difference of a single token, nats; empty: 100 times the mean's", None)

    def __post_init__(self) -> None:
        require(self.samples >= 1, "score.agreement.samples must be at least 1: drop the section for none")
        for name in ("mean", "p99", "max"):
            value = getattr(self, name)
            require(value is None or value > 0, f"score.agreement.{name} must be above 0")
