"""`lopd status`: how far a run is, across all the processes and machines at work on it.

It writes nothing into the run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_lopd.loggers import METRICS_FILE, read_steps
from megatron_lopd.pipeline.judgement import judge
from megatron_lopd.pipeline.plan_file import PLAN_FILE
from megatron_lopd.pipeline.resolved import ResolvedRun
from megatron_lopd.pipeline.stage import SharedStage, Stage
from megatron_lopd.runtime.claim_files import ClaimState, announced, claim_path, claimed_places, read_claims
from megatron_lopd.runtime.display import duration
from megatron_lopd.runtime.owner import Owner
from megatron_lopd.stages.table import STAGES
from megatron_lopd.training.checkpoints import checkpoints_in

INDENT = " " * 11


def describe_run(run: ResolvedRun) -> Iterator[str]:
    """Yield the lines of the view. Raises DataError for a damaged manifest, claim or metric."""
    needed = [stage for stage in STAGES if stage.needed(run)]
    compared = run.models_are_fingerprinted()  # else it would hash them
    judged = {each.stage.name: each for each in judge(needed, run)} if compared else {}
    for stage in needed:
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
        each = judged.get(stage.name)
        if each is not None and each.state not in ("committed", "begun", "to do"):
            state = [f"{state[0]} ({each.state})", *state[1:]]
        yield f"{stage.name:{len(INDENT)}}{state[0]}"
        yield from (INDENT + line for line in state[1:])
        if each is not None and each.refusal is not None:
            yield INDENT + str(each.refusal)
    if not compared and any(run.is_committed(stage.name) for stage in needed):
        yield "not compared with the recipe, as models would be hashed for it: lopd run --dry-run does"


def _committed(stage: Stage, run: ResolvedRun) -> list[str]:
    """What a stage counted."""
    counts = run.manifest(stage.name).counts
    counted = ", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in counts.items())
    return [f"committed: {counted}" if counted else "committed"]


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
        f"{state.part}, {state.done:,} of {state.total:,} samples, {state.rate:,.0f} response tokens/s, "
        f"heard of {duration(heard)} ago"
    )


def _training(directory: Path, steps: int | None) -> str:
    rows = read_steps(directory / METRICS_FILE)
    last = rows[-1]["step"] if rows else 0
    saved = next((path.name for path in checkpoints_in(directory / "checkpoints")), "none yet")
    return f"step {last:,}" + (f" of {steps:,}" if steps else "") + f"; newest checkpoint: {saved}"
