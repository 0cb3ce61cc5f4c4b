"""The recipe: frozen dataclasses and their strict YAML form. Imports no torch."""

from megatron_lopd.config.cluster import Cluster
from megatron_lopd.config.engine import EngineConfig
from megatron_lopd.config.engine_agreement import AgreementConfig
from megatron_lopd.config.fp8 import Fp8Config
from megatron_lopd.config.guard import GuardConfig
from megatron_lopd.config.keys import NotNegative, Options, Positive, key, require
from megatron_lopd.config.layout import ParallelConfig, Recompute
from megatron_lopd.config.prompt_sources import PromptSource, PromptSources
from megatron_lopd.config.recipe import (
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    OptimizerConfig,
    Recipe,
    RolloutConfig,
    Sampling,
    ScoreConfig,
    SftConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
    TrainingConfig,
)
from megatron_lopd.config.recipe_file import deciding, describe_keys, load_cluster, load_recipe, to_plain
from megatron_lopd.config.weights import WeightsConfig

__all__ = [
    "AgreementConfig",
    "Cluster",
    "EngineConfig",
    "EvaluateConfig",
    "ExportConfig",
    "Fp8Config",
    "GenerateConfig",
    "GuardConfig",
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
    "StudentConfig",
    "TeacherConfig",
    "TrainConfig",
    "TrainingConfig",
    "WeightsConfig",
    "deciding",
    "describe_keys",
    "key",
    "load_cluster",
    "load_recipe",
    "require",
    "to_plain",
]
