"""What a run is: every key of the recipe, its type, its unit and its default.

`--help` prints the help texts kept here, so each key is described once. Paths are relative to the
directory `lopd` is started in. Checks that need one section alone are in its `__post_init__`; they
raise ConfigError with the dotted key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_lopd.config.engine import EngineConfig
from megatron_lopd.config.engine_agreement import AgreementConfig
from megatron_lopd.config.fp8 import Fp8Config
from megatron_lopd.config.guard import GuardConfig
from megatron_lopd.config.keys import key, require
from megatron_lopd.config.layout import ParallelConfig
from megatron_lopd.config.prompt_sources import PromptSources
from megatron_lopd.config.weights import WeightsConfig


@dataclass(frozen=True)
class TeacherConfig:
    model: str = key("Hugging Face checkpoint directory of the teacher")


@dataclass(frozen=True)
class StudentConfig:
    model: str = key("Hugging Face checkpoint directory of the base student")
    init: Literal["pretrained", "random"] = key(
        "pretrained: read the weights; random: read config.json alone and draw weights from the seed",
        "pretrained",
    )


@dataclass(frozen=True)
class Sampling:
    max_new_tokens: int = key("longest response, tokens: the trained horizon", 4096)
    temperature: float = key("softmax temperature; 0 is greedy", 1.0)
    top_p: float = key("nucleus probability mass; 1 keeps all", 1.0)
    top_k: int = key("keep the k most likely tokens; 0 keeps all", 0)
    samples_per_prompt: int = key("responses drawn for each prompt", 1)

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, "sampling.max_new_tokens must be at least 1")
        require(self.temperature >= 0, "sampling.temperature must be at least 0")
        require(0 < self.top_p <= 1, "sampling.top_p must be in (0, 1]")
        require(self.top_k >= 0, "sampling.top_k must be at least 0 (0 keeps all)")
        require(self.samples_per_prompt >= 1, "sampling.samples_per_prompt must be at least 1")


@dataclass(frozen=True)
class GenerateConfig:
    sampling: Sampling = key("how the teacher answers", factory=Sampling)
    engine: EngineConfig = key("what runs the teacher", factory=EngineConfig)


@dataclass(frozen=True)
class RolloutConfig:
    sampling: Sampling = key("how the student answers", factory=Sampling)
    engine: EngineConfig = key("what runs the student", factory=EngineConfig)


@dataclass(frozen=True)
class ScoreConfig:
    engine: EngineConfig = key("what runs the teacher", factory=EngineConfig)
    top_k: int = key(
        "most likely teacher tokens kept at each response position, for the topk objectives; 0 keeps none",
        64,
    )
    agreement: AgreementConfig | None = key(
        "a second engine that must agree before the first score is written; empty: none",
        None,
        operational=True,
    )

    def __post_init__(self) -> None:
        require(self.top_k >= 0, "score.top_k must be at least 0 (0 keeps none)")


@dataclass(frozen=True)
class OptimizerConfig:
    lr: float = key("peak learning rate", 2e-6)
    min_lr: float = key("learning rate at the end of the schedule", 0.0)
    schedule: Literal["constant", "cosine", "linear"] = key("decay after the warm-up", "constant")
    warmup_steps: int = key("steps from 0 to the peak learning rate", 0)
    beta1: float = key("Adam beta 1", 0.9)
    beta2: float = key("Adam beta 2", 0.98)
    eps: float = key("Adam epsilon", 1e-8)
    weight_decay: float = key("decoupled weight decay (none on biases and norms)", 0.1)
    clip_grad: float = key("global gradient norm to clip to; 0 does not clip", 1.0)

    def __post_init__(self) -> None:
        require(self.lr > 0, "optimizer.lr must be above 0")
        require(0 <= self.min_lr <= self.lr, "optimizer.min_lr must be between 0 and lr")
        require(self.warmup_steps >= 0, "optimizer.warmup_steps must be at least 0")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name} must be in [0, 1)")
        require(self.eps > 0, "optimizer.eps must be above 0")
        require(self.weight_decay >= 0, "optimizer.weight_decay must be at least 0")
        require(self.clip_grad >= 0, "optimizer.clip_grad must be at least 0 (0 does not clip)")


@dataclass(frozen=True)
class TrainingConfig:
    """What sft and train have in common: the data order, the step and the checkpoints."""

    steps: int | None = key("optimizer steps; give steps or epochs", None)
    epochs: float | None = key("passes over the data; give steps or epochs", None)
    global_batch_size: int = key("samples in an optimizer step", 256)
    micro_batch_tokens: int = key("token budget of a packed micro-batch", 16384)
    loss_normalization: Literal["sequence_mean", "token_mean"] = key(
        "sequence_mean: mean over tokens, then over samples; token_mean: mean over all tokens",
        "sequence_mean",
    )
    optimizer: OptimizerConfig = key("AdamW and its schedule", factory=OptimizerConfig)
    checkpoint_every: int = key("steps between checkpoints", 50, operational=True)
    keep_checkpoints: int = key(
        "newest checkpoints kept; more where train.guard would have none from before its window",
        2,
        operational=True,
    )
    max_skipped_steps: int = key("steps skipped for non-finite gradients before the run stops", 3)
    loggers: tuple[str, ...] = key("what writes the metrics", ("jsonl", "tensorboard"), operational=True)

    section = "training"

    def __post_init__(self) -> None:
        require(
            (self.steps is None) != (self.epochs is None),
            f"{self.section}: give either steps or epochs, and not both",
        )
        require(self.steps is None or self.steps >= 1, f"{self.section}.steps must be at least 1")
        require(self.epochs is None or self.epochs > 0, f"{self.section}.epochs must be above 0")
        warmup = self.optimizer.warmup_steps
        require(
            self.steps is None or warmup < self.steps,
            f"{self.section}.optimizer.warmup_steps={warmup} must be below {self.section}.steps={self.steps}",
        )
        for name in ("global_batch_size", "micro_batch_tokens", "checkpoint_every", "keep_checkpoints"):
            require(getattr(self, name) >= 1, f"{self.section}.{name} must be at least 1")
        require(
            "jsonl" in self.loggers,
            f"{self.section}.loggers: jsonl is not among them, and report and status read it: add it",
        )
        require(self.max_skipped_steps >= 0, f"{self.section}.max_skipped_steps must be at least 0")


@dataclass(frozen=True)
class SftConfig(TrainingConfig):
    data: str | None = key("JSONL of {messages} to fine-tune on, instead of what generate made", None)
    checkpoint: str | None = key("an SFT checkpoint made elsewhere, used instead of training", None)
    teacher: str | None = key(
        "the teacher that data or checkpoint was made with (Hugging Face directory): declared, not proved",
        None,
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
    objective: Literal["sampled_reverse_kl", "topk_reverse_kl", "topk_forward_kl", "fixed_negative"] = key(
        "the loss; see objectives.py; topk_reverse_kl and topk_forward_kl need score.top_k; "
        "sampled_reverse_kl is the published one",
        "topk_reverse_kl",
    )
    importance: Literal["none", "clipped"] = key(
        "clipped: weigh each token by how much likelier it is to the student than to its sampler, at most "
        "importance_clip; sampled_reverse_kl only",
        "none",
    )
    importance_clip: float = key(
        "largest importance weight: a token twice as likely as when it was sampled counts in full", 2.0
    )
    weights: WeightsConfig = key("weights on the loss's tokens and terms", factory=WeightsConfig)
    guard: GuardConfig = key(
        "what stops a run that has drifted from its rollouts (exit 3)", factory=GuardConfig, operational=True
    )
    checkpoint: str | None = key("Hugging Face checkpoint to train, instead of the sft stage's", None)
    refresh_every: int | None = key(
        "steps after which the current student is rolled out and scored anew, again and again; empty: never",
        None,
    )
    preflight_samples: int = key("rollouts re-scored by the trainer before step 1", 64)
    preflight_tolerance: float | None = key(
        "largest mean |trainer - kept| behaviour log-prob before the run is refused, nats; empty: by the "
        "coarser precision of trainer and sampler, 1e-3 for fp32, 0.05 for bf16, 0.2 for fp8",
        None,
    )

    section = "train"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refresh_every is not None:
            _require_refresh(self.refresh_every, self.steps)
        require(self.preflight_samples >= 0, "train.preflight_samples must be at least 0 (0 checks nothing)")
        require(
            self.preflight_tolerance is None or self.preflight_tolerance > 0,
            "train.preflight_tolerance must be above 0",
        )
        self._check_objective()

    def _check_objective(self) -> None:
        """Options that the objective has no place for: the log-probs they need are of other tokens."""
        sampled = self.objective == "sampled_reverse_kl"
        require(self.importance_clip > 0, f"train.importance_clip={self.importance_clip:g} must be above 0")
        require(
            self.importance == "none" or sampled,
            f"train.importance={self.importance} weighs the sampled token's loss, and "
            f"train.objective={self.objective} has another: set train.importance=none, or "
            "train.objective=sampled_reverse_kl",
        )
        require(
            self.weights.extrapolation == 1 or sampled,
            f"train.weights.extrapolation={self.weights.extrapolation:g} needs pi_ref's log-probs, which are "
            f"kept of sampled tokens alone: set it to 1 with train.objective={self.objective}, or "
            "train.objective=sampled_reverse_kl",
        )
        require(
            self.weights.entropy is None or self.objective == "topk_reverse_kl",
            f"train.weights.entropy={self.weights.entropy} adds the forward KL to topk_reverse_kl alone: "
            f"leave it empty with train.objective={self.objective}, or set train.objective=topk_reverse_kl",
        )


def _require_refresh(every: int, steps: int | None) -> None:
    require(
        every >= 1, f"train.refresh_every must be at least 1, not {every}: leave it empty to never refresh"
    )
    require(steps is not None, "train.refresh_every needs train.steps: give it instead of train.epochs")
    require(
        steps is None or every < steps,
        f"train.refresh_every={every} must be below train.steps={steps}: leave it empty to never refresh",
    )


@dataclass(frozen=True)
class ExportConfig:
    max_shard_bytes: int = key("largest safetensors file, bytes", 4_000_000_000)
    quantization: Literal["none", "fp8"] = key(
        "fp8: beside the exact model, one in NVIDIA modelopt's FP8 that vLLM loads (export/model-fp8)", "none"
    )
    calibration_samples: int = key("rollouts that set the scales of FP8 activations", 256)

    def __post_init__(self) -> None:
        require(self.max_shard_bytes >= 1, "export.max_shard_bytes must be at least 1")
        require(self.calibration_samples >= 1, "export.calibration_samples must be at least 1")


@dataclass(frozen=True)
class EvaluateConfig:
    grader: str = key(
        "what checks an answer: math (math-verify, the last \\boxed{} first), arithmetic, or "
        "arithmetic_dialects, which takes both ways to write it",
        "arithmetic",
    )
    teacher: bool = key("grade the teacher too: the score that the student is distilled towards", False)
    sampling: Sampling = key(
        "how the sampled accuracy is drawn; samples_per_prompt=n gives avg@n and pass@1, 2, 4, ... n",
        factory=Sampling,
    )
    engine: EngineConfig = key("what runs the models", factory=EngineConfig)


@dataclass(frozen=True)
class Recipe:
    """A whole run. Sections a command does not need may be left out."""

    run_dir: str = key("directory the run's artifacts are written to")
    seed: int = key("seed of initial weights, sampling and data order", 0)
    teacher: TeacherConfig | None = key("the teacher", None)
    student: StudentConfig | None = key("the base student", None)
    prompts: PromptSources = key("prompts by stage", factory=PromptSources)
    precision: Literal["fp32", "bf16"] = key("training precision (master weights are fp32)", "bf16")
    fp8: Fp8Config | None = key("FP8 layers on NVIDIA GPUs with Transformer Engine, in training", None)
    parallel: ParallelConfig = key(
        "how sft and train are split over ranks", factory=ParallelConfig, operational=True
    )
    generate: GenerateConfig = key("1. the teacher answers", factory=GenerateConfig)
    sft: SftConfig | None = key("2. the student is fine-tuned", None)
    rollout: RolloutConfig = key("3. the student answers, once", factory=RolloutConfig)
    score: ScoreConfig = key("4. the teacher scores those tokens, once", factory=ScoreConfig)
    train: TrainConfig | None = key("5. OPD from the cached scores", None)
    export: ExportConfig = key("6. the trained student as a Hugging Face checkpoint", factory=ExportConfig)
    evaluate: EvaluateConfig = key("7. accuracy of the students", factory=EvaluateConfig)
    allow_teacher_mismatch: bool = key(
        "go on although the lineage is broken; written into everything downstream", False
    )

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, f"seed must be between 0 and 2^63 - 1, not {self.seed}")
        require(
            self.fp8 is None or self.precision == "bf16",
            "fp8 layers stand among bf16 ones: set precision=bf16, or drop the fp8 section",
        )
        if self.train is not None:
            _check_cache(self.train, self.score, self.rollout.sampling)
        for section in ("generate", "rollout", "evaluate"):
            name = getattr(self, section).engine.name
            require(
                name != "megatron",
                f"{section}.engine.name={name} cannot sample, only score: set {section}.engine.name to "
                "another, and score.engine.name to it",
            )
        require(
            self.train is None or self.train.refresh_every is None or self.teacher is not None,
            "train.refresh_every needs the teacher, to score the student's new samples: give teacher.model",
        )


def _check_cache(train: TrainConfig, score: ScoreConfig, sampling: Sampling) -> None:
    """Raise ConfigError unless rollout and score will keep what the objective reads."""
    require(
        not train.objective.startswith("topk_") or score.top_k > 0,
        f"train.objective={train.objective} needs the teacher's top k: set score.top_k (to 64, say) and run "
        "the score stage with it",
    )
    most = math.log(score.top_k + 2)  # the k, the sampled token, and the rest as one event
    entropy = train.weights.entropy
    require(
        entropy is None or entropy < most,
        f"train.weights.entropy={entropy} is never exceeded: score.top_k={score.top_k} kept tokens show an "
        f"entropy of at most {most:.3g} nats: lower it, or raise score.top_k",
    )
    require(
        train.importance == "none" or sampling.temperature > 0,
        "train.importance=clipped needs tokens that were drawn at random, and rollout.sampling.temperature=0 "
        "draws none: set train.importance=none, or the temperature above 0",
    )
    plain = sampling.temperature in (0, 1) and sampling.top_p == 1 and sampling.top_k == 0
    require(
        train.weights.extrapolation == 1 or plain,
        f"train.weights.extrapolation={train.weights.extrapolation:g} needs pi_ref's own log-probs, and the "
        "rollouts keep those of another temperature, top-p or top-k: set rollout.sampling to temperature=1, "
        "top_p=1, top_k=0, or train.weights.extrapolation=1",
    )
