"""What a training run depends on, as its stage says it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_lopd.artifacts.manifest import LineageStatus
from megatron_lopd.config import Fp8Config, GuardConfig, ParallelConfig, TrainingConfig
from megatron_lopd.data.batch_plan import PlanPart

if TYPE_CHECKING:
    from megatron_lopd.training.data_sources import DataSource
    from megatron_lopd.training.preflight import Preflight


@dataclass(frozen=True)
class ModelSetup:
    """Which model, and how it is computed.

    `directory` is the Hugging Face directory to start from, its weights left unread when `init` is "random";
    they are drawn from `seed` then, and so is the order of the data.
    """

    directory: Path
    parallel: ParallelConfig
    precision: Literal["fp32", "bf16"]
    seed: int
    fp8: Fp8Config | None = None
    init: Literal["pretrained", "random"] = "pretrained"


@dataclass(frozen=True)
class Segment:
    """Steps that are trained from data of their own, and how far that data's lineage is proved.

    `part`: which steps an attempt is to do; None for all.
    """

    data: DataSource
    lineage: LineageStatus
    part: PlanPart | None = None


@dataclass(frozen=True)
class TrainingJob:
    """Everything a run depends on.

    `name` labels its progress. `identity` is a digest of all that decides its numbers (model, data,
    recipe): a checkpoint that carries another is refused. `work_dir` gets checkpoints/ and the metrics.
    `preflight` None checks nothing, and `guard` None stops for nothing.

    `segment_at(steps done)`, where given, says in every rank alike what to train from next; it may refuse.
    `segment` is then the first.
    """

    name: str
    identity: str
    work_dir: Path
    model: ModelSetup
    config: TrainingConfig
    objective: str
    segment: Segment
    segment_at: Callable[[int], Segment] | None = None
    preflight: Preflight | None = None
    guard: GuardConfig | None = None
