"""`lopd status`: how far a run is, across all the processes and machines at work on it. It writes nothing."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_lopd.artifacts.manifest import is_committed, load_manifest
from megatron_lopd.config import Recipe
from megatron_lopd.pipeline.stage import PLAN_FILE, directory_of
from megatron_lopd.runtime.claims import ClaimState, announced, claim_path, claimed_places, read_claims
from megatron_lopd.runtime.display import duration
from megatron_lopd.runtime.owner import Owner
from megatron_lopd.stages.table import STAGES
from megatron_lopd.training.loggers import METRICS_FILE

INDENT = " " * 11


def describe_run(recipe: Recipe) -> Iterator[str]:
    """Yield the lines of the view. Raises DataError for a damaged manifest or claim."""
    for stage in STAGES:
        if not stage.needed(recipe):
            continue
        directory = directory_of(recipe, stage.name)
        if is_committed(directory):
            counts = load_manifest(directory).counts
            state = ["committed"]
            if counts:
                state[0] += ": " + ", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in counts.items())
        elif stage.share is not None and (places := claimed_places(directory)):
            state = list(_shared(places))
        elif (directory / METRICS_FILE).is_file():
            config = recipe.sft if stage.name == "sft" else recipe.train
            state = [_training(directory, config.steps if config is not None else None)]
        else:
            state = ["begun" if (directory / PLAN_FILE).is_file() else "to do"]
        yield f"{stage.name:{len(INDENT)}}{state[0]}"
        yield from (INDENT + line for line in state[1:])


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
    yield f"at work: {made}; workers: {len(live)}{left}"
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
    lines = (directory / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    try:
        last = json.loads(lines[-1])["step"] if lines else 0
    except (json.JSONDecodeError, KeyError):  # being written this moment
        last = json.loads(lines[-2])["step"] if len(lines) > 1 else 0
    saved = max((path.name for path in (directory / "checkpoints").glob("step_*")), default="none yet")
    return f"step {last:,}" + (f" of {steps:,}" if steps else "") + f"; newest checkpoint: {saved}"
