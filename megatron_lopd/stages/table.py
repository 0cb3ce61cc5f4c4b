"""The stages in their order."""

from __future__ import annotations

from megatron_lopd.pipeline.stage import Stage
from megatron_lopd.stages.evaluate import Evaluate
from megatron_lopd.stages.export import Export
from megatron_lopd.stages.generate import Generate
from megatron_lopd.stages.online import Online
from megatron_lopd.stages.report import Report
from megatron_lopd.stages.rollout import Rollout
from megatron_lopd.stages.score import Score
from megatron_lopd.stages.sft import Sft
from megatron_lopd.stages.tokenize import Tokenize
from megatron_lopd.stages.train import Train

GENERATE, TOKENIZE, SFT, ROLLOUT, SCORE = Generate(), Tokenize(), Sft(), Rollout(), Score()
TRAIN, EXPORT, EVALUATE, REPORT, ONLINE = Train(), Export(), Evaluate(), Report(), Online()

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
