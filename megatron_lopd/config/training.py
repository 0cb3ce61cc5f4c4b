"""How a model is trained: what sft and train share, and what is each one's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta

from megatron_lopd.config.keys import (
    Count,
    CountOrZero,
    Decay,
    FilePath,
    Fraction,
    NotNegative,
    Positive,
    key,
    options_of,
    require,
    settle_options,
)
from megatron_lopd.registry import LOGGERS, OBJECTIVES

MOST_ROUNDS = 10_000  # each is a directory of its own


@dataclass(frozen=True)
class WeightsConfig:
    """Weights on a distillation loss, one key each; the objectives have their formulas."""

    position: Annotated[float, Meta(ge=1)] = key(
        "weight of a response's first token, falling to 1 at its end as teacher and sampling student come to "
        "disagree; 1 weighs all alike (IW-OPD: 1.5)",
        1.0,
    )
    horizon: Count | None = key("response tokens that count, from the first on; empty: all", None)


@dataclass(frozen=True)
class GuardConfig:
    """How far the student may drift from the one that made the rollouts.

    All operational: they decide whether a run goes on, and nothing of its numbers.
    """

    min_kept_mass: Fraction | None = key(
        "least kept_mass (share of the student's probability that is still on what was sampled) before the "
        "run is stopped; empty: never",
        0.93,
        operational=True,
    )
    max_drift_kl: Positive | None = key(
        "largest drift_kl before the run is stopped, nats a token; empty: never", None, operational=True
    )
    min_effective_sample_size: Fraction | None = key(
        "least effective_sample_size before the run is stopped, fraction; empty: never",
        None,
        operational=True,
    )
    window: Count = key("steps whose median is held against the limits (count)", 10, operational=True)

    @property
    def is_on(self) -> bool:
        """Whether any limit is set."""
        limits = (self.min_kept_mass, self.max_drift_kl, self.min_effective_sample_size)
        return any(limit is not None for limit in limits)


@dataclass(frozen=True)
class OptimizerConfig:
    lr: Positive = key("peak learning rate", 2e-6)
    min_lr: NotNegative = key("learning rate at the end of the schedule", 0.0)
    schedule: Literal["constant", "cosine", "linear"] = key("decay after the warm-up", "constant")
    warmup_steps: CountOrZero = key("steps from 0 to the peak learning rate", 0)
    beta1: Decay = key("Adam beta 1", 0.9)
    beta2: Decay = key("Adam beta 2", 0.98)
    eps: Positive = key("Adam epsilon", 1e-8)
    weight_decay: NotNegative = key("decoupled weight decay (none on biases and norms)", 0.1)
    clip_grad: NotNegative = key("global gradient norm to clip to; 0 does not clip", 1.0)

    def __post_init__(self) -> None:
        require(self.min_lr <= self.lr, "optimizer.min_lr must be at most lr")


@dataclass(frozen=True)
class TrainingConfig:
    """What sft and train have in common: the data order, the step and the checkpoints."""

    steps: Annotated[int, Meta(ge=1, le=10**8)] | None = key("optimizer steps; give steps or epochs", None)
    epochs: Annotated[float, Meta(gt=0, le=10**6)] | None = key(
        "passes over the data; give steps or epochs", None
    )
    global_batch_size: Count = key("samples in an optimizer step", 256)
    micro_batch_tokens: Count = key("token budget of a packed micro-batch", 16384, operational=True)
    loss_normalization: Literal["sequence_mean", "token_mean"] = key(
        "sequence_mean: mean over tokens, then over samples; token_mean: mean over all tokens",
        "sequence_mean",
    )
    optimizer: OptimizerConfig = key("AdamW and its schedule", factory=OptimizerConfig)
    checkpoint_every: Count = key("steps between checkpoints", 50, operational=True)
    keep_checkpoints: Count = key(
        "newest checkpoints kept; more where train.guard would have none from before its window",
        2,
        operational=True,
    )
    max_skipped_steps: CountOrZero = key(
        "steps skipped for non-finite gradients before the run stops", 3, operational=True
    )
    loggers: tuple[str, ...] = key(
        "what writes the metrics", ("jsonl", "tensorboard"), operational=True, door=LOGGERS
    )

    section = "training"

    def __post_init__(self) -> None:
        require(
            (self.steps is None) != (self.epochs is None),
            f"{self.section}: give either steps or epochs, and not both",
        )
        require(
            "jsonl" in self.loggers,
            f"{self.section}.loggers: jsonl is not among them, and report and status read it: add it",
        )
        warmup = self.optimizer.warmup_steps
        require(
            self.steps is None or warmup < self.steps,
            f"{self.section}.optimizer.warmup_steps={warmup} must be below {self.section}.steps={self.steps}",
        )
        require(
            len(set(self.loggers)) == len(self.loggers),
            f"{self.section}.loggers: one is named twice: keep one of it",
        )


@dataclass(frozen=True)
class SftConfig(TrainingConfig):
    data: FilePath | None = key("JSONL of {messages} to fine-tune on, instead of what generate made", None)
    checkpoint: FilePath | None = key("an SFT checkpoint made elsewhere, used instead of training", None)
    teacher: FilePath | None = key(
        "the teacher that data or checkpoint was made with (Hugging Face directory): declared, not proved",
        None,
    )

    leave_out_cut: bool = key(
        "train on no answer that was cut at generate.sampling.max_new_tokens: it has no end to learn", False
    )

    section = "sft"

    def __post_init__(self) -> None:
        require(
            self.data is None or self.checkpoint is None,
            "sft: give either data (to train on) or checkpoint (made elsewhere), and not both",
        )
        require(
            self.teacher is None or self.data is not None or self.checkpoint is not None,
            "sft.teacher declares who made sft.data or sft.checkpoint: give one of them, or drop it",
        )
        if self.checkpoint is None:
            super().__post_init__()


@dataclass(frozen=True)
class TrainConfig(TrainingConfig):
    objective: str = key("the loss", "topk_reverse_kl", door=OBJECTIVES)
    weights: WeightsConfig = key("weights on the loss's tokens", factory=WeightsConfig)
    guard: GuardConfig = key(
        "what stops a run that has drifted from its rollouts (exit 3)", factory=GuardConfig, operational=True
    )
    checkpoint: FilePath | None = key("Hugging Face checkpoint to train, instead of the sft stage's", None)
    refresh_every: Count | None = key(
        "steps after which the current student is rolled out and scored anew, again and again; empty: never",
        None,
    )
    preflight_samples: CountOrZero = key(
        "rollouts re-scored by the trainer before step 1", 64, operational=True
    )
    preflight_tolerance: Positive | None = key(
        "largest mean |trainer - kept| behaviour log-prob before the run is refused, nats; empty: by the "
        "coarser precision of trainer and sampler, 1e-3 for fp32, 0.05 for bf16, 0.2 for fp8",
        None,
        operational=True,
    )
    options: Any = options_of("objective")

    section = "train"

    def __post_init__(self) -> None:
        super().__post_init__()
        settle_options(self)
        if self.refresh_every is not None:
            _require_refresh(self.refresh_every, self.steps)


def _require_refresh(every: int, steps: int | None) -> None:
    require(steps is not None, "train.refresh_every needs train.steps: give it instead of train.epochs")
    require(
        steps is None or every < steps,
        f"train.refresh_every={every} must be below train.steps={steps}: leave it empty to never refresh",
    )
    require(
        steps is None or steps <= every * MOST_ROUNDS,
        f"train.refresh_every={every} in train.steps={steps} is above {MOST_ROUNDS:,} refreshes: raise it",
    )
