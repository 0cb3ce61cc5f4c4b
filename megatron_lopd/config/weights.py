"""Weights on a distillation loss, one key each; objectives.py has their formulas."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lopd.config.keys import key, require


@dataclass(frozen=True)
class WeightsConfig:
    position: float = key(
        "weight of a response's first token, falling to 1 at its end as teacher and sampling student come to "
        "disagree; 1 weighs all alike (IW-OPD: 1.5)",
        1.0,
    )
    horizon: int | None = key("response tokens that count, from the first on; empty: all", None)
    entropy: float | None = key(
        "teacher entropy above which a token gets the forward KL added, nats; topk_reverse_kl only; empty: "
        "none",
        None,
    )
    extrapolation: float = key(
        "factor on the teacher's reward over the sampling student; sampled_reverse_kl only; 1 is plain OPD, "
        "above 1 goes beyond the teacher (ExOPD)",
        1.0,
    )

    def __post_init__(self) -> None:
        require(
            self.position >= 1,
            f"train.weights.position={self.position:g} must be at least 1 (1 weighs all tokens alike)",
        )
        require(
            self.horizon is None or self.horizon >= 1,
            f"train.weights.horizon={self.horizon} must be at least 1 (leave it empty to count all tokens)",
        )
        require(
            self.entropy is None or self.entropy >= 0,
            f"train.weights.entropy={self.entropy} must be at least 0 nats (leave it empty to add nothing)",
        )
        require(
            self.extrapolation > 0,
            f"train.weights.extrapolation={self.extrapolation:g} must be above 0 (1 is plain OPD)",
        )
