"""`lopd status`: how far a run is, across all the processes and machines at work on it.

It writes nothing into the run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_lopd.errors import LineageError
from megatron_lopd.loggers import METRICS_FILE, read_steps
from megatron_lopd.pipeline.execute import why_changed
from megatron_lopd.pipeline.plan_file import PLAN_FILE
from megatron_lopd.pipeline.resolved import ResolvedRun
from megatron_lopd.pipeline.stage import SharedStage, Stage
from megatron_lopd.runtime.claim_files import ClaimState, announced, claim_path, claimed_places, read_claims
from megatron_lopd.runtime.display import duration
from megatron_lopd.runtime.owner import Owner
from megatron_lopd.stages.table import STAGES

INDENT = " " * 11


def describe_run(run: ResolvedRun) -> Iterator[str]:
    """Yield the lines of the view. Raises DataError for a damaged manifest, claim or metric."""
    for stage in STAGES:
        if not stage.needed(run):
            continue
        directory = run.directory_of(stage.name)
        if run.is_committed(stage.name):
            state = _committed(stage, run)
        elif isinstance(stage, SharedStage) and (places := claimed_places(directory)):
            state = list(_shared(places))
        elif (directory / METRICS_FILE).is_file():
            config = run.recipe.sft if stage.name == "sft" else run.recipe.train
            state = [_training(directory, config.steps if config is not None else None)]
        else:
            state = ["begun" if (directory / PLAN_FILE).is_file() else "to do"]
        yield f"{stage.name:{len(INDENT)}}{state[0]}"
        yield from (INDENT + line for line in state[1:])


def _committed(stage: Stage, run: ResolvedRun) -> list[str]:
    """What a stage counted; and, where no model is to be hashed for it, whether it is this recipe's."""
    counts = run.manifest(stage.name).counts
    state = "committed"
    if counts:
        state += ": " + ", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in counts.items())
    reason = why_changed(stage, run) if run.models_are_fingerprinted() else None
    if reason is None:
        return [state]
    whose = "by another recipe" if isinstance(reason, LineageError) else "and damaged since"
    return [f"{state}, {whose}", str(reason)]


def _shared(places: Sequence[Path]) -> Iterator[str]:
    """A stage that workers share: how much is there, who is at work, and what has failed."""
    here = Owner.here()
    shards = done = parts = samples = 0
    working: list[tuple[Path, ClaimState]] = []
    failures: list[ClaimState] = []
    for place in places:
        expected = announced(place)
        there = expected.keys() & os.listdir(place)
        parts, shards = parts + len(expected), shards + len(there)
        samples, done = samples + sum(expected.values()), done + sum(expected[name] for name in there)
        for part, states in read_claims(place).items():
            if part not in there and states[-1].status == "working":
                working.append((place, states[-1]))
            failures += [state for state in states if state.status == "failed"]
    live = [state for _, state in working if not state.owner.is_gone(here)]
    done += sum(state.done for state in live)
    rate = sum(state.done_per_second for state in live)
    left = f", {duration((samples - done) / rate)} left" if rate else ""
    made = f"{shards:,} of {parts:,} shards, {done:,} of {samples:,} samples"
    yield f"at work: {made}; workers: {len(live)}{left}" if live else f"begun, nobody at work: {made}"
    for place, state in working:
        yield f"{state.owner.host} pid {state.owner.pid}: {_worker(place, state, here)}"
    for state in failures:
        yield f"{state.owner.host} pid {state.owner.pid}: {state.part} failed: {state.error}"


def _worker(place: Path, state: ClaimState, here: Owner) -> str:
    if state.owner.is_gone(here):
        return f"{state.part}: the process is gone, its shard waits to be taken over"
    try:
        written = claim_path(place, state.part, state.generation).stat().st_mtime
    except FileNotFoundError:
        return f"{state.part}: committed this moment"
    heard = max(0.0, time.time() - written)
    return (
        f"{state.part}, {state.done:,} of {state.total:,} samples, {state.rate:,.0f} tokens/s, heard of "
        f"{duration(heard)} ago"
    )


def _training(directory: Path, steps: int | None) -> str:
    rows = read_steps(directory / METRICS_FILE)
    last = rows[-1]["step"] if rows else 0
    saved = max((path.name for path in (directory / "checkpoints").glob("step_*")), default="none yet")
    return f"step {last:,}" + (f" of {steps:,}" if steps else "") + f"; newest checkpoint: {saved}"
