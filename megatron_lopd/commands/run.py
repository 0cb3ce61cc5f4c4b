"""Running all stages, or one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from megatron_lopd.artifacts.digest_cache import relying_on_hints
from megatron_lopd.config import load_recipe
from megatron_lopd.errors import (
    ConfigError,
    DataError,
    LopdError,
    NumericsError,
    RefreshDue,
    StopRequested,
)
from megatron_lopd.pipeline.execute import (
    check_begun,
    check_unchanged,
    execute,
    is_main_rank,
    parents_of,
)
from megatron_lopd.pipeline.judgement import Judgement, judge
from megatron_lopd.pipeline.resolved import ResolvedRun
from megatron_lopd.pipeline.rounds import Round, due_round, missing_round
from megatron_lopd.pipeline.stage import SharedStage, Stage
from megatron_lopd.pipeline.verified import verified_for_workers
from megatron_lopd.runtime import environment
from megatron_lopd.runtime.display import say
from megatron_lopd.runtime.launch import in_own_process, is_worker, launch, launch_workers
from megatron_lopd.runtime.signals import STOP_SIGNALS, stopping_at_once
from megatron_lopd.stages import online, refresh, report
from megatron_lopd.stages.table import ALONE, ONLINE, REPORT, SFT, STAGES, TRAIN


@dataclass(frozen=True)
class Command:
    """A run, and how another process is told of its recipe."""

    run: ResolvedRun
    recipe_path: str
    overrides: Sequence[str]

    def arguments(self, name: str) -> list[str]:
        """Of `lopd`, to do with it what `name` says."""
        return [name, self.recipe_path, *self.overrides]


@relying_on_hints()
def describe(run: ResolvedRun, names: Sequence[str]) -> Iterator[str]:
    """Check the recipe for the named stages; then say what each would do, a line each, as the command would.

    Raises what the command would be refused with, after the lines that say where.
    """
    check_run_dir(run)
    named = [stage for stage in (*STAGES, *ALONE) if stage.name in names and stage.needed(run)]
    planned = {stage.name: stage.check(run) for stage in named if not run.is_committed(stage.name)}
    refreshes = refresh.check(run) if "refresh" in names else []
    before = list(_before(named[0], run)) if len(names) == 1 and named else []
    return _described(run, judge([*before, *named], run), names, planned, refreshes)


def _described(
    run: ResolvedRun,
    judgements: Iterable[Judgement],
    names: Sequence[str],
    planned: Mapping[str, Sequence[str]],
    refreshes: Sequence[str],
) -> Iterator[str]:
    refusal = None
    for each in judgements:
        refusal = refusal or each.refusal
        name = each.stage.name
        if name in names or each.refusal is not None:
            state = each.state + ("" if each.refusal is None else f": {each.refusal}")
            for line in planned.get(name, [str(run.directory_of(name))]):
                yield f"{name:9} [{state}] {line}"
    yield from (f"refresh   [to do] {line}" for line in refreshes)
    if refusal is not None:
        raise refusal


def waiting_stages(run: ResolvedRun) -> list[Stage]:
    """The stages that the recipe needs and that are not committed."""
    return [stage for stage in STAGES if stage.needed(run) and not run.is_committed(stage.name)]


def run_all(command: Command) -> None:
    """Every stage the recipe needs, in order. Nothing is spent before the whole recipe is checked.

    Where this process hides GPUs (`environment.hide_gpus`), others do whatever uses one: each gives all of it
    back when it ends.
    """
    run = command.run
    needed = [stage for stage in STAGES if stage.needed(run)]
    if not needed:
        raise ConfigError("the recipe asks for nothing: give a section sft, and train to go on to OPD")
    check_run_dir(run)
    waiting = waiting_stages(run)
    names = [stage.name for stage in waiting]
    if _asks_of_gpu(run):
        planned = in_own_process(_check_anew, command.recipe_path, list(command.overrides), names)
    else:
        planned = _check(run, names)
    if waiting:
        for each in judge(needed, run):
            if each.refusal is not None:
                raise each.refusal
    done = 0
    for number, stage in enumerate(needed, start=1):
        if stage in waiting:
            _say(f"[{number}/{len(needed)}] {stage.name}: {'; '.join(planned[stage.name])}")
        started = time.monotonic()
        if stage in waiting and stage.processes(run) == 1 and _is_divided(stage, run):
            _launch_workers(stage, command)
            done += 1
        elif stage in waiting and _is_launched(stage, run):
            _refreshing(stage, command, partial(_launch, stage, command))
            done += 1
        elif _refreshing(stage, command, partial(execute, stage, run)):
            done += 1
            _say(f"[{number}/{len(needed)}] {stage.name}: done in {time.monotonic() - started:.1f} s")
    if REPORT in needed:
        _say(report.headline(run))
    if not done:
        _say(f"nothing to do: all {len(needed)} stages in {run.directory} are committed and unchanged")


def run_leaving_gpus(command: Command) -> None:
    """`run_all`, in a process that takes none of a GPU's memory; it looks for one only if there is work."""
    if waiting_stages(command.run):
        environment.hide_gpus()
    try:
        run_all(command)
    finally:
        environment.show_gpus()


def run_one(name: str, command: Command) -> None:
    """One stage, after checking that what it stands on is still what the recipe says.

    A stage of several ranks starts them, unless a launcher has: each of its processes has a RANK.
    """
    run = command.run
    stage = next(stage for stage in (*STAGES, *ALONE) if stage.name == name)

    if stage in (SFT, TRAIN, ONLINE):
        environment.set_for_training(run.recipe.parallel)

    def check() -> None:
        check_run_dir(run)
        if not run.is_committed(name):
            stage.check(run)

    def prepare() -> None:
        check()
        for earlier in _before(stage, run):
            check_unchanged(earlier, run)

    if "RANK" not in os.environ and stage.processes(run) > 1 and not run.is_committed(name):
        check()
        stage.plan(run)
        _launch(stage, command)
        return
    _on_rank_zero(prepare)
    started = time.monotonic()
    if not run.is_committed(name) and _is_divided(stage, run):
        _launch_workers(stage, command)
    elif execute(stage, run):
        _say(f"{name}: done in {time.monotonic() - started:.1f} s: {run.directory_of(name)}")
    else:
        _say(f"{name}: nothing to do: {run.directory_of(name)} is committed and unchanged")
    if stage is ONLINE and is_main_rank():  # which has committed it: the others may be ahead of that
        _say(online.headline(run))


def _on_rank_zero(work: Callable[[], None]) -> None:
    """Do `work` in the one rank there is; or in rank 0 while the others, who have met it, wait for it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        work()
    else:
        from megatron_lopd.training.consensus import on_rank_zero

        on_rank_zero(work)


def run_refresh(run: ResolvedRun) -> None:
    """Make the next refresh's artifacts from train's newest checkpoint, if training has come to it."""
    check_run_dir(run)
    refresh.check(run)
    for earlier in _before(TRAIN, run):
        check_unchanged(earlier, run)
    check_begun(TRAIN, run)
    each, missing = due_round(run), missing_round(run)
    if each is not None:
        _refresh(each, run)
    elif missing is None:
        _say("refresh: nothing to do: every refresh is made")
    else:
        raise DataError(
            f"refresh {missing.number} is made from the checkpoint at step {missing.first_step}, and there "
            f"is no whole one in {run.directory_of('train')}: run lopd train to that step first"
        )


def _refreshing(stage: Stage, command: Command, attempt: Callable[[], bool]) -> bool:
    """What `attempt` at a stage returns; train's is made again after each refresh that it stops for."""
    run = command.run
    if stage is not TRAIN or run.is_committed(stage.name):
        return attempt()
    while True:
        each = due_round(run)
        if each is not None:
            check_begun(stage, run)
            if environment.hides_gpus():
                _launched("refresh", 1, command)
            else:
                _refresh(each, run)
        try:
            return attempt()
        except RefreshDue:
            continue


def _refresh(each: Round, run: ResolvedRun) -> None:
    for stage in refresh.stages_of(each):
        started = time.monotonic()
        if execute(stage, run):
            _say(f"{stage.name}: done in {time.monotonic() - started:.1f} s")


def check_run_dir(run: ResolvedRun) -> None:
    """Raise ConfigError when a file is where the run's directory should be, or it could not be written."""
    here = run.directory.absolute()
    for each in (here, *here.parents):
        if each.exists() and not each.is_dir():
            raise ConfigError(f"run_dir: {each} is a file: choose another directory")
    nearest = next(each for each in (here, *here.parents) if each.exists())
    if waiting_stages(run) and not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"run_dir: {nearest} cannot be written: choose another directory")


def _before(stage: Stage, run: ResolvedRun) -> Iterator[Stage]:
    """The committed stages in front of `stage`."""
    for earlier in STAGES[: STAGES.index(SFT) + 1 if stage in ALONE else STAGES.index(stage)]:
        if earlier.needed(run) and run.is_committed(earlier.name):
            yield earlier


def _check(run: ResolvedRun, names: Sequence[str]) -> dict[str, list[str]]:
    """What each of the named stages would do. Raises as their checks do."""
    return {stage.name: stage.check(run) for stage in STAGES if stage.name in names}


def _check_anew(recipe_path: str, overrides: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    """`_check` in a process that has not read the recipe, nor imported what it names."""
    return _check(ResolvedRun(load_recipe(recipe_path, overrides)), names)


def _asks_of_gpu(run: ResolvedRun) -> bool:
    """Whether checking the recipe has GPUs looked at that this process does not see: for what only some
    GPUs' layers can do, and for whether those of several ranks are of one kind."""
    recipe, gate = run.recipe, run.recipe.score.agreement
    fp8 = recipe.fp8, recipe.score.engine.fp8, gate.engine.fp8 if gate is not None else None
    by_layers = recipe.parallel.recompute == "moe_act" or any(each is not None for each in fp8)
    return environment.hides_gpus() and (by_layers or recipe.parallel.processes > 1)


def _is_launched(stage: Stage, run: ResolvedRun) -> bool:
    """Whether other processes do a stage of `lopd run`, rather than this one."""
    return stage.processes(run) > 1 or (environment.hides_gpus() and stage.on_gpu(run))


def _launch(stage: Stage, command: Command) -> bool:
    """Run a stage in as many processes as the recipe says. Raises RefreshDue when train waits for that."""
    _launched(stage.name, stage.processes(command.run), command)
    return True


def _launched(name: str, processes: int, command: Command) -> None:
    """`lopd name` in its own processes. They have printed what went wrong, if anything."""
    code, asked_to_stop = launch(command.arguments(name), processes)
    if (
        code == RefreshDue.exit_code
        and not asked_to_stop
        and name == TRAIN.name
        and due_round(command.run, rehash=False)
    ):
        raise RefreshDue(f"{name} waits for its rollouts to be refreshed")
    if asked_to_stop and code - 128 in STOP_SIGNALS:  # it came before there was anything to save
        raise StopRequested(f"{name}: stopped on request: run the same command again")
    if code:
        raise _error_of(code)(f"{name} ended with exit code {code}: its own message is above")


def _is_divided(stage: Stage, run: ResolvedRun) -> bool:
    """Whether this process starts workers for a stage, rather than doing it."""
    return isinstance(stage, SharedStage) and stage.workers(run) > 1 and not is_worker()


def _launch_workers(stage: Stage, command: Command) -> None:
    """Run a stage in as many workers as the recipe says. What cannot be is said, and hashed, once."""
    assert isinstance(stage, SharedStage)
    run = command.run
    with stopping_at_once(f"{stage.name}: stopped on request"):
        parents = parents_of(run, stage.plan(run))
        told = ExitStack()
        told.enter_context(verified_for_workers(parents, run.directory_of(stage.name)))
    with told:
        code = launch_workers(command.arguments(stage.name), stage.workers(run))
    if code:
        raise _error_of(code)(f"{stage.name}'s workers ended with exit code {code}: their messages are above")


def _error_of(exit_code: int) -> type[LopdError]:
    kinds: tuple[type[LopdError], ...] = (StopRequested, ConfigError, NumericsError)
    return next((kind for kind in kinds if kind.exit_code == exit_code), LopdError)


def _say(text: str) -> None:
    if is_main_rank():
        say(f"lopd: {text}")
