"""Limits on how far the student may drift from the one that made the rollouts."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lopd.config.keys import key, require


@dataclass(frozen=True)
class GuardConfig:
    """All operational: they decide whether a run goes on, and nothing of its numbers."""

    min_kept_mass: float | None = key(
        "least kept_mass (share of the student's probability that is still on what was sampled) before the "
        "run is stopped; empty: never",
        0.93,
        operational=True,
    )
    max_drift_kl: float | None = key(
        "largest drift_kl before the run is stopped, nats a token; empty: never", None, operational=True
    )
    min_effective_sample_size: float | None = key(
        "least effective_sample_size before the run is stopped, fraction; empty: never",
        None,
        operational=True,
    )
    window: int = key("steps whose median is held against the limits (count)", 10, operational=True)

    def __post_init__(self) -> None:
        for name in ("min_kept_mass", "min_effective_sample_size"):
            limit = getattr(self, name)
            require(
                limit is None or 0 < limit < 1,
                f"train.guard.{name}={limit} must be between 0 and 1 (leave it empty to never stop)",
            )
        require(
            self.max_drift_kl is None or self.max_drift_kl > 0,
            f"train.guard.max_drift_kl={self.max_drift_kl} must be above 0 (leave it empty to never stop)",
        )
        require(self.window >= 1, f"train.guard.window={self.window} must be at least 1 step")

    @property
    def is_on(self) -> bool:
        """Whether any limit is set."""
        limits = (self.min_kept_mass, self.max_drift_kl, self.min_effective_sample_size)
        return any(limit is not None for limit in limits)
