"""What it costs that workers share a stage: many shards of an engine that answers at once.

    python tools/bench/workers.py [--shards N] [--workers N] [--dir DIR]

The engine is a fake, `InstantEngine`: a sample costs nothing, so that what is measured is the claims, the
shards' files and what is told of them. Workers are processes of their own, as `lopd rollout` starts them;
their imports are not counted, the clock runs from when all are ready until the last has ended. They work in
memory (/dev/shm), for what a disk takes to flush a file it takes of one process too. Then `lopd status` is
run, with live claims of as many workers, and the files are committed as an artifact and opened.

The last line is one JSON object: `overhead_s`, wall seconds of all workers together, and `overhead_cpu_s`,
CPU seconds of all of them, which a busy machine leaves as they are; `alone_s`, of one process that writes
the same shards and shares nothing; `status_cpu_s`, CPU seconds of the whole command; `commit_s`, of hashing
and listing the files; `open_s`, of opening them all to read.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_lopd.artifacts.manifest import commit, plan_digest
from megatron_lopd.data.dataset import open_shards, shard_name
from megatron_lopd.data.records import Rollout
from megatron_lopd.data.schemas import ROLLOUTS
from megatron_lopd.data.shards import shard_writer
from megatron_lopd.pipeline import workers
from megatron_lopd.pipeline.workers import Count, Part, Work, make_parts
from megatron_lopd.runtime.claim_files import announce
from megatron_lopd.runtime.claims import Claims

TOKENS = np.arange(8, dtype=np.int32)
PLAN = plan_digest({}, {})  # of what no stage made
LOG_PROBS = -np.ones(8, dtype=np.float32)


class InstantEngine:
    """A fake: its answers are there before they are asked for."""

    def rollouts(self, number: int) -> Iterator[Rollout]:
        """The one sample of shard `number`."""
        yield Rollout(f"prompt-{number}/0", TOKENS, TOKENS, "stop", LOG_PROBS)

    def close(self) -> None:
        """Nothing is open."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="what sharing a stage among workers costs")
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--dir", default="/dev/shm", help="where to work (default: /dev/shm)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        print(json.dumps(measure(Path(name), arguments.shards, arguments.workers)))


def measure(root: Path, shards: int, count: int) -> dict[str, Any]:
    """Every figure, by the names of the JSON object."""
    write(InstantEngine(), root / "warm", 0, iter)  # what Arrow imports is nobody's
    began = time.perf_counter()
    for number in range(shards):
        write(InstantEngine(), root / "alone" / shard_name(ROLLOUTS, number), number, iter)
    alone = time.perf_counter() - began
    directory = root / "run/rollout"
    overhead, overhead_cpu = shared(directory, shards, count)
    status = status_seconds(root, directory, shards, count)
    began = time.perf_counter()
    names = sorted(path.name for path in directory.glob("*.arrow"))
    commit(directory, "rollout", files=names, config={}, counts={}, versions={}, parents={}, lineage="proved")
    committed = time.perf_counter() - began
    began = time.perf_counter()
    assert len(open_shards(ROLLOUTS, directory)) == shards
    opened = time.perf_counter() - began
    figures = {
        "overhead_s": overhead,
        "overhead_cpu_s": overhead_cpu,
        "alone_s": alone,
        "commit_s": committed,
        "open_s": opened,
        "status_cpu_s": status,
    }
    return {"shards": shards, "workers": count} | {name: round(value, 2) for name, value in figures.items()}


def write(engine: Any, path: Path, number: int, count: Count[Rollout]) -> None:
    """Make one shard."""
    with shard_writer(path, ROLLOUTS, PLAN) as shard:
        for record in count(engine.rollouts(number)):
            shard.add(record)


def work_of(directory: Path, shards: int) -> Work:
    """The whole stage, as each worker has it."""

    def part(number: int) -> Part:
        path = directory / shard_name(ROLLOUTS, number)
        return Part(path, 1, lambda engine, private, count: write(engine, private, number, count))

    return Work("rollout", None, directory, [part(number) for number in range(shards)], PLAN)


def shared(directory: Path, shards: int, count: int) -> tuple[float, float]:
    """Wall and CPU seconds that `count` workers take for all shards, once they are all ready."""
    context = multiprocessing.get_context("spawn")
    ready, used = context.Barrier(count + 1), context.Queue()
    processes = [context.Process(target=worker, args=(directory, shards, ready, used)) for _ in range(count)]
    for process in processes:
        process.start()
    ready.wait()
    began = time.perf_counter()
    cpu = sum(used.get() for _ in processes)
    wall = time.perf_counter() - began
    for process in processes:
        process.join()
    return wall, cpu


def worker(directory: Path, shards: int, ready: Any, used: Any) -> None:
    """One of them, in its own process, with the fake in the place of a model."""
    workers._Worker._engine = lambda *unused: InstantEngine()  # type: ignore[assignment]
    work = work_of(directory, shards)
    write(InstantEngine(), directory.parent / f"warm-{os.getpid()}", 0, iter)
    ready.wait()
    before = time.process_time()
    make_parts([work])
    used.put(time.process_time() - before)


def status_seconds(root: Path, directory: Path, shards: int, count: int) -> float:
    """CPU seconds of `lopd status` on the directory, with a live claim of each worker."""
    recipe = {"run_dir": str(root / "run"), "sft": {"steps": 1}, "train": {"steps": 1}}
    models = {name: {"model": str(root)} for name in ("teacher", "student")}
    prompts = {"prompts": {name: {"task": "arithmetic", "count": 8} for name in ("sft", "opd")}}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe | models | prompts))
    announce(directory, {shard_name(ROLLOUTS, number): 1 for number in range(shards + count)})
    command = [sys.executable, "-m", "megatron_lopd.cli", "status", str(root / "recipe.yaml")]
    with ExitStack() as held:
        for number in range(count):
            claim = Claims(directory).take(shard_name(ROLLOUTS, shards + number))
            assert claim is not None
            held.enter_context(claim)
        before = cpu_seconds()
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        seconds = cpu_seconds() - before
    assert f"{shards:,} of {shards + count:,} shards" in said, said
    assert f"workers: {count}" in said, said
    return seconds


def cpu_seconds() -> float:
    """CPU time of the children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
