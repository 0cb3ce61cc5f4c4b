"""The recipe: frozen dataclasses and their strict YAML form. Imports no torch."""

from megatron_lopd.config.cluster import Cluster
from megatron_lopd.config.describe import KeyText, describe_keys
from megatron_lopd.config.engine import AgreementConfig, EngineConfig, Fp8Config
from megatron_lopd.config.keys import (
    Count,
    CountOrZero,
    Decay,
    FilePath,
    Fraction,
    NotNegative,
    Options,
    Positive,
    Share,
    check_options,
    key,
    require,
)
from megatron_lopd.config.layout import ParallelConfig, Recompute
from megatron_lopd.config.prompt_sources import PromptSource, PromptSources
from megatron_lopd.config.recipe import (
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    Recipe,
    RolloutConfig,
    Sampling,
    ScoreConfig,
    StudentConfig,
    TeacherConfig,
)
from megatron_lopd.config.recipe_file import load_cluster, load_recipe
from megatron_lopd.config.training import (
    GuardConfig,
    OptimizerConfig,
    SftConfig,
    TrainConfig,
    TrainingConfig,
    WeightsConfig,
)
from megatron_lopd.config.tree import deciding, to_plain

__all__ = [
    "AgreementConfig",
    "Cluster",
    "Count",
    "CountOrZero",
    "Decay",
    "EngineConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FilePath",
    "Fp8Config",
    "Fraction",
    "GenerateConfig",
    "GuardConfig",
    "KeyText",
    "NotNegative",
    "OptimizerConfig",
    "Options",
    "ParallelConfig",
    "Positive",
    "PromptSource",
    "PromptSources",
    "Recipe",
    "Recompute",
    "RolloutConfig",
    "Sampling",
    "ScoreConfig",
    "SftConfig",
    "Share",
    "StudentConfig",
    "TeacherConfig",
    "TrainConfig",
    "TrainingConfig",
    "WeightsConfig",
    "check_options",
    "deciding",
    "describe_keys",
    "key",
    "load_cluster",
    "load_recipe",
    "require",
    "to_plain",
]
