"""The stages in their order."""

from __future__ import annotations

from megatron_lopd.pipeline.stage import Stage
from megatron_lopd.stages.evaluate import EvaluateStage
from megatron_lopd.stages.export import ExportStage
from megatron_lopd.stages.generate import GenerateStage
from megatron_lopd.stages.online import OnlineStage
from megatron_lopd.stages.report import ReportStage
from megatron_lopd.stages.rollout import RolloutStage
from megatron_lopd.stages.score import ScoreStage
from megatron_lopd.stages.sft import SftStage
from megatron_lopd.stages.tokenize import TokenizeStage
from megatron_lopd.stages.train import TrainStage

GENERATE = GenerateStage()
TOKENIZE = TokenizeStage()
SFT = SftStage()
ROLLOUT = RolloutStage()
SCORE = ScoreStage()
TRAIN = TrainStage()
EXPORT = ExportStage()
EVALUATE = EvaluateStage()
REPORT = ReportStage()
ONLINE = OnlineStage()

STAGES: tuple[Stage, ...] = (
    GENERATE,
    TOKENIZE,
    SFT,
    ROLLOUT,
    SCORE,
    TRAIN,
    EXPORT,
    EVALUATE,
    REPORT,
)
ALONE: tuple[Stage, ...] = (ONLINE,)  # run by their own command, and by it alone
