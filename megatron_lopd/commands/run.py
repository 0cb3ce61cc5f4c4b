"""Running all stages, or one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_lopd.artifacts.manifest import is_committed
from megatron_lopd.config import Recipe
from megatron_lopd.errors import ConfigError, DataError, LopdError, NumericsError, RefreshDue, StopRequested
from megatron_lopd.pipeline.rounds import Round, due_round, missing_round
from megatron_lopd.pipeline.stage import (
    Stage,
    check_begun,
    check_unchanged,
    directory_of,
    execute,
    is_main_rank,
)
from megatron_lopd.runtime.environment import hides_gpus
from megatron_lopd.runtime.launch import in_own_process, is_worker, launch, launch_workers
from megatron_lopd.runtime.signals import STOP_SIGNALS
from megatron_lopd.stages.table import ALONE, ONLINE, REPORT, SFT, STAGES, TRAIN, function


def describe(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """Check the recipe for the named stages and say what each would do, a line each."""
    lines = []
    for stage in (*STAGES, *ALONE):
        if stage.name in names and stage.needed(recipe):
            state = "committed" if is_committed(directory_of(recipe, stage.name)) else "to do"
            lines += [f"{stage.name:9} [{state}] {line}" for line in stage.check(recipe)]
    if "refresh" in names:
        lines += [f"refresh   [to do] {line}" for line in function("refresh", "check")(recipe)]
    return lines


def run_all(recipe: Recipe, recipe_path: str, overrides: Sequence[str]) -> None:
    """Every stage the recipe needs, in order. Nothing is spent before the whole recipe is checked.

    Where this process hides GPUs (`environment.hide_gpus`), others do whatever uses one: each gives all of it
    back when it ends.
    """
    needed = [stage for stage in STAGES if stage.needed(recipe)]
    if not needed:
        raise ConfigError("the recipe asks for nothing: give a section sft, and train to go on to OPD")
    check_run_dir(recipe)
    waiting = [stage for stage in needed if not is_committed(directory_of(recipe, stage.name))]
    names = [stage.name for stage in waiting]
    planned = in_own_process(_check, recipe, names) if _asks_of_gpu(recipe) else _check(recipe, names)
    command = _Command(recipe, recipe_path, overrides)
    done = 0
    for number, stage in enumerate(needed, start=1):
        if stage in waiting:
            _say(f"[{number}/{len(needed)}] {stage.name}: {'; '.join(planned[stage.name])}")
        started = time.monotonic()
        if stage in waiting and stage.processes(recipe) == 1 and _is_divided(stage, recipe):
            _launch_workers(stage, command)
            done += 1
        elif stage in waiting and _is_launched(stage, recipe):
            _refreshing(stage, command, partial(_launch, stage, command))
            done += 1
        elif _refreshing(stage, command, partial(execute, stage, recipe)):
            done += 1
            _say(f"[{number}/{len(needed)}] {stage.name}: done in {time.monotonic() - started:.1f} s")
    if REPORT in needed:
        _say(function("report", "headline")(recipe))
    if not done:
        _say(f"nothing to do: all {len(needed)} stages in {recipe.run_dir} are committed and unchanged")


def run_one(name: str, recipe: Recipe, recipe_path: str, overrides: Sequence[str]) -> None:
    """One stage, after checking that what it stands on is still what the recipe says.

    One of ALONE starts its ranks itself, unless it is one of them already.
    """
    stage = next(stage for stage in (*STAGES, *ALONE) if stage.name == name)
    command = _Command(recipe, recipe_path, overrides)
    if is_main_rank():
        check_run_dir(recipe)
        stage.check(recipe)
    if stage in ALONE and stage.processes(recipe) > 1 and "RANK" not in os.environ:
        stage.plan(recipe)
        _launch(stage, command)
        return
    if is_main_rank():
        for earlier in _before(stage, recipe):
            check_unchanged(earlier, recipe)
    started = time.monotonic()
    if not is_committed(directory_of(recipe, name)) and _is_divided(stage, recipe):
        _launch_workers(stage, command)
    elif execute(stage, recipe):
        _say(f"{name}: done in {time.monotonic() - started:.1f} s: {directory_of(recipe, name)}")
    else:
        _say(f"{name}: nothing to do: {directory_of(recipe, name)} is committed and unchanged")
    if stage is ONLINE:
        _say(function("online", "headline")(recipe))


def run_refresh(recipe: Recipe) -> None:
    """Make the next refresh's artifacts from train's newest checkpoint, if training has come to it."""
    check_run_dir(recipe)
    function("refresh", "check")(recipe)
    for earlier in _before(TRAIN, recipe):
        check_unchanged(earlier, recipe)
    check_begun(TRAIN, recipe)
    each, missing = due_round(recipe), missing_round(recipe)
    if each is not None:
        _refresh(each, recipe)
    elif missing is None:
        _say("refresh: nothing to do: every refresh is made")
    else:
        raise DataError(
            f"refresh {missing.number} is made from the checkpoint at step {missing.first_step}, and there "
            f"is no whole one in {directory_of(recipe, 'train')}: run lopd train to that step first"
        )


def _refreshing(stage: Stage, command: _Command, attempt: Callable[[], bool]) -> bool:
    """What `attempt` at a stage returns; train's is made again after each refresh that it stops for."""
    recipe = command.recipe
    if stage is not TRAIN or is_committed(directory_of(recipe, stage.name)):
        return attempt()
    while True:
        each = due_round(recipe)
        if each is not None:
            check_begun(stage, recipe)
            if hides_gpus():
                _launched("refresh", 1, command)
            else:
                _refresh(each, recipe)
        try:
            return attempt()
        except RefreshDue:
            continue


def _refresh(each: Round, recipe: Recipe) -> None:
    for stage in function("refresh", "stages_of")(each):
        started = time.monotonic()
        if execute(stage, recipe):
            _say(f"{stage.name}: done in {time.monotonic() - started:.1f} s")


def check_run_dir(recipe: Recipe) -> None:
    """Raise ConfigError when a file is where the run's directory should be."""
    path = Path(recipe.run_dir)
    for each in (path, *path.parents):
        if each.exists() and not each.is_dir():
            raise ConfigError(f"run_dir: {each} is a file: choose another directory")


def _before(stage: Stage, recipe: Recipe) -> Iterator[Stage]:
    """The committed stages in front of `stage`."""
    for earlier in STAGES[: STAGES.index(SFT) + 1 if stage in ALONE else STAGES.index(stage)]:
        if earlier.needed(recipe) and is_committed(directory_of(recipe, earlier.name)):
            yield earlier


@dataclass(frozen=True)
class _Command:
    """The recipe, and how another process is told of it."""

    recipe: Recipe
    path: str
    overrides: Sequence[str]

    def arguments(self, name: str) -> list[str]:
        """Of `lopd`, to do with it what `name` says."""
        return [name, self.path, *self.overrides]


def _check(recipe: Recipe, names: Sequence[str]) -> dict[str, list[str]]:
    """What each of the named stages would do. Raises as their checks do."""
    return {stage.name: stage.check(recipe) for stage in STAGES if stage.name in names}


def _asks_of_gpu(recipe: Recipe) -> bool:
    """Whether checking the recipe has GPUs looked at that this process does not see: for what only some
    GPUs' layers can do, and for whether those of several ranks are of one kind."""
    gate = recipe.score.agreement
    fp8 = recipe.fp8, recipe.score.engine.fp8, gate.engine.fp8 if gate is not None else None
    by_layers = recipe.parallel.recompute == "moe_act" or any(each is not None for each in fp8)
    return hides_gpus() and (by_layers or recipe.parallel.processes > 1)


def _is_launched(stage: Stage, recipe: Recipe) -> bool:
    """Whether other processes do a stage of `lopd run`, rather than this one."""
    return stage.processes(recipe) > 1 or (hides_gpus() and stage.on_gpu(recipe))


def _launch(stage: Stage, command: _Command) -> bool:
    """Run a stage in as many processes as the recipe says. Raises RefreshDue when train waits for that."""
    _launched(stage.name, stage.processes(command.recipe), command)
    return True


def _launched(name: str, processes: int, command: _Command) -> None:
    """`lopd name` in its own processes. They have printed what went wrong, if anything."""
    code, asked_to_stop = launch(command.arguments(name), processes)
    if (
        code == RefreshDue.exit_code
        and not asked_to_stop
        and name == TRAIN.name
        and due_round(command.recipe, rehash=False)
    ):
        raise RefreshDue(f"{name} waits for its rollouts to be refreshed")
    if asked_to_stop and code - 128 in STOP_SIGNALS:  # it came before there was anything to save
        raise StopRequested(f"{name}: stopped on request: run the same command again")
    if code:
        raise _error_of(code)(f"{name} ended with exit code {code}: its own message is above")


def _is_divided(stage: Stage, recipe: Recipe) -> bool:
    """Whether this process starts workers for a stage, rather than doing it."""
    return stage.share is not None and stage.workers(recipe) > 1 and not is_worker()


def _launch_workers(stage: Stage, command: _Command) -> None:
    stage.plan(command.recipe)  # what cannot be is said once
    code = launch_workers(command.arguments(stage.name), stage.workers(command.recipe))
    if code:
        raise _error_of(code)(f"{stage.name}'s workers ended with exit code {code}: their messages are above")


def _error_of(exit_code: int) -> type[LopdError]:
    kinds: tuple[type[LopdError], ...] = (StopRequested, ConfigError, NumericsError)
    return next((kind for kind in kinds if kind.exit_code == exit_code), LopdError)


def _say(text: str) -> None:
    if is_main_rank():
        print(f"lopd: {text}", flush=True)
