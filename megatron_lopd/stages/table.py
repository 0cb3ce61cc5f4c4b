"""The stages in their order, by what a recipe says of each; what they do is in the modules of their names.

Those are imported when a function of theirs is called: together they import torch, Megatron-Core, matplotlib
and more, and `lopd status` needs none of it, nor does training what samples, grades or draws.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from megatron_lopd.config import Recipe
from megatron_lopd.pipeline.stage import Stage


def function(module: str, name: str) -> Callable[..., Any]:
    """`megatron_lopd.stages.<module>.<name>`, imported when it is called."""

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"megatron_lopd.stages.{module}"), name)(*arguments)

    return call


def _stage(name: str, kind: str, *, shared: bool = False, **values: Any) -> Stage:
    return Stage(
        name,
        kind,
        check=function(name, "check"),
        plan=function(name, "plan"),
        run=function(name, "run"),
        share=function(name, "share") if shared else None,
        **values,
    )


def _trains(recipe: Recipe) -> bool:
    return recipe.train is not None


def _ranks(recipe: Recipe) -> int:
    return recipe.parallel.processes


def _with_rounds(*arguments: Any) -> Any:
    return importlib.import_module("megatron_lopd.pipeline.rounds").with_rounds(*arguments)


GENERATE = _stage(
    "generate",
    "rollouts",
    needed=lambda recipe: (
        recipe.sft is not None and recipe.sft.data is None and recipe.sft.checkpoint is None
    ),
    shared=True,
    workers=lambda recipe: recipe.generate.engine.workers,
)
TOKENIZE = _stage(
    "tokenize",
    "rollouts",
    on_gpu=lambda recipe: False,
    needed=lambda recipe: recipe.sft is not None and recipe.sft.data is not None,
)
SFT = _stage("sft", "model", processes=_ranks, needed=lambda recipe: recipe.sft is not None)
ROLLOUT = _stage(
    "rollout",
    "rollouts",
    needed=_trains,
    shared=True,
    workers=lambda recipe: recipe.rollout.engine.workers,
)
SCORE = _stage(
    "score",
    "scores",
    processes=function("score", "processes"),
    needed=_trains,
    shared=True,
    workers=lambda recipe: recipe.score.engine.workers,
)
TRAIN = _stage("train", "checkpoint", processes=_ranks, needed=_trains, complete=_with_rounds)
EXPORT = _stage("export", "model", on_gpu=lambda recipe: recipe.export.quantization == "fp8", needed=_trains)
EVALUATE = _stage(
    "evaluate",
    "evaluation",
    needed=lambda recipe: recipe.prompts.eval is not None and recipe.sft is not None,
    shared=True,
    workers=lambda recipe: recipe.evaluate.engine.workers,
)
REPORT = _stage(
    "report",
    "report",
    on_gpu=lambda recipe: False,
    needed=lambda recipe: recipe.prompts.eval is not None and recipe.train is not None,
)
ONLINE = _stage("online", "model", processes=_ranks, needed=_trains)

STAGES = (GENERATE, TOKENIZE, SFT, ROLLOUT, SCORE, TRAIN, EXPORT, EVALUATE, REPORT)
ALONE = (ONLINE,)  # run by their own command, and by it alone
