"""What a run is: every key of the recipe, its type, its unit and its default.

`--help` prints the help texts kept here, so each key is described once. Paths are relative to the
directory `lopd` is started in. Checks that need one section alone are in its `__post_init__`; they
raise ConfigError with the dotted key.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from msgspec import Meta

from megatron_lopd.config.engine import AgreementConfig, EngineConfig, Fp8Config
from megatron_lopd.config.keys import Count, CountOrZero, FilePath, NotNegative, Positive, Share, key, require
from megatron_lopd.config.layout import ParallelConfig
from megatron_lopd.config.prompt_sources import PromptSources
from megatron_lopd.config.training import SftConfig, TrainConfig
from megatron_lopd.registry import ENGINES, FAMILIES, GRADERS, OBJECTIVES


@dataclass(frozen=True)
class TeacherConfig:
    model: FilePath = key("Hugging Face checkpoint directory of the teacher")
    family: str | None = key("the model family; empty: its config.json says it", None, door=FAMILIES)


@dataclass(frozen=True)
class StudentConfig:
    model: FilePath = key("Hugging Face checkpoint directory of the base student")
    init: Literal["pretrained", "random"] = key(
        "pretrained: read the weights; random: read config.json alone and draw weights from the seed",
        "pretrained",
    )
    family: str | None = key("the model family; empty: its config.json says it", None, door=FAMILIES)


@dataclass(frozen=True)
class Sampling:
    max_new_tokens: Count = key("longest response, tokens: the trained horizon", 4096)
    temperature: NotNegative = key("softmax temperature; 0 is greedy", 1.0)
    top_p: Share = key("nucleus probability mass; 1 keeps all", 1.0)
    top_k: CountOrZero = key("keep the k most likely tokens; 0 keeps all", 0)
    samples_per_prompt: Count = key("responses drawn for each prompt", 1)

    @property
    def is_plain(self) -> bool:
        """Whether kept log-probs are the model's own: of temperature 1, nothing cut off; greedy too."""
        return self.temperature == 0 or (self.temperature, self.top_p, self.top_k) == (1, 1, 0)


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
    top_k: CountOrZero = key(
        "most likely teacher tokens kept at each response position, for the topk objectives; 0 keeps none",
        64,
    )
    agreement: AgreementConfig | None = key(
        "a second engine that must agree before the first score is written; empty: none",
        None,
        operational=True,
    )


@dataclass(frozen=True)
class ExportConfig:
    max_shard_bytes: Count = key("largest safetensors file, bytes", 4_000_000_000)
    quantization: Literal["none", "fp8"] = key(
        "fp8: beside the exact model, one in NVIDIA modelopt's FP8 that vLLM loads (export/model-fp8)", "none"
    )
    calibration_samples: Count = key("rollouts that set the scales of FP8 activations", 256)


@dataclass(frozen=True)
class EvaluateConfig:
    grader: str = key(
        "what checks an answer; empty: a built-in task's own, where every set of prompts.eval is of one",
        "",
        door=GRADERS,
    )
    teacher: bool = key("grade the teacher too: the score that the student is distilled towards", False)
    grading_minutes: Positive = key(
        "processor time for grading a model's answers to a set, minutes; what is not graded in it counts as "
        "wrong, and is told",
        60.0,
        operational=True,
    )
    sampling: Sampling = key(
        "how the sampled accuracy is drawn; samples_per_prompt=n gives avg@n and pass@1, 2, 4, ... n",
        factory=Sampling,
    )
    engine: EngineConfig = key("what runs the models", factory=EngineConfig)


@dataclass(frozen=True)
class Recipe:
    """A whole run. Sections a command does not need may be left out."""

    run_dir: FilePath = key("directory the run's artifacts are written to")
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = key(
        "seed of initial weights, sampling and data order", 0
    )
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
    allow_user_code: bool = key(
        "import what this recipe names as module:name; its file's digest goes into the lineage", False
    )

    def __post_init__(self) -> None:
        require(
            self.run_dir.strip() != "" and "\0" not in self.run_dir,
            f"run_dir={self.run_dir!r} names no directory: give one",
        )
        require(
            self.run_dir.isprintable(),
            f"run_dir={self.run_dir!r} has characters that do not print: choose a name of others",
        )
        require(
            self.fp8 is None or self.precision == "bf16",
            "fp8 layers stand among bf16 ones: set precision=bf16, or drop the fp8 section",
        )
        if self.train is not None:
            needs = OBJECTIVES[self.train.objective].needs
            require(
                "top_k" not in needs or self.score.top_k > 0,
                f"train.objective={self.train.objective} needs the teacher's top k: set score.top_k (to 64, "
                "say, or to 8 where the teacher has few tokens) and run the score stage with it",
            )
        for section in ("generate", "rollout", "evaluate"):
            name = getattr(self, section).engine.name
            require(
                ENGINES[name].samples,
                f"{section}.engine.name={name} cannot sample, only score: set {section}.engine.name to "
                "another, and score.engine.name to it",
            )
        self._settle_grader()
        require(
            self.train is None or self.train.refresh_every is None or self.teacher is not None,
            "train.refresh_every needs the teacher, to score the student's new samples: give teacher.model",
        )
        if self.train is not None:
            self.train.options.check(self)

    def _settle_grader(self) -> None:
        """Where prompts.eval is of one built-in task, its own grader, which has the task's name.

        Raises ConfigError where a grader is to be named.
        """
        sets = self.prompts.eval or {}
        if self.evaluate.grader or not sets:
            return
        tasks = {source.task or "" for source in sets.values()}
        require(
            len(tasks) == 1 and "" not in tasks,
            "missing key evaluate.grader: what checks the answers of prompts.eval: give one of "
            f"{', '.join(GRADERS.things())}",
        )
        object.__setattr__(self, "evaluate", replace(self.evaluate, grader=tasks.pop()))
