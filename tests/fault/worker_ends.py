"""Workers that end, thousands of them, where calls on files are late. Run with file_faults.c preloaded.

    LD_PRELOAD=LIBRARY python -m tests.fault.worker_ends WORK_DIR ROUNDS [--latency-ms N] [--disturb] [--bare]

A round is one of the stages that workers share, made by WORKERS forks of this process, which has imported
everything; with --bare a stage of small files, with no model in it: all that is left is how workers share.
Each begins at a moment of its own, so that some come while others commit. With --disturb some are killed and
replaced, and some stopped, for longer than their lease now and then, and woken. After each round every byte
is held to what one worker alone makes, and nothing may be left over. The last line is one JSON object: worker
ends, those that failed, kills, stops.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, NoReturn, cast

from megatron_lopd.artifacts.manifest import load_manifest
from megatron_lopd.cli import main as lopd
from megatron_lopd.errors import LopdError
from megatron_lopd.files.writing import atomic_write_json
from megatron_lopd.pipeline import workers as sharing
from megatron_lopd.pipeline.execute import execute
from megatron_lopd.pipeline.plan_file import PLAN_FILE
from megatron_lopd.pipeline.stage import Output, Plan, SharedStage
from megatron_lopd.pipeline.workers import Derived, Work, make_parts
from megatron_lopd.runtime import claims
from megatron_lopd.runtime.claim_files import CLAIMS
from tests.shims.file_faults import Faults, tell

if TYPE_CHECKING:
    from megatron_lopd.pipeline.resolved import ResolvedRun

WORKERS = 8
STAGES = ("rollout", "score", "evaluate")
BARE = "bare"
BEFORE = ("generate", "sft")
LEASE = 0.4  # seconds, where workers are disturbed
LATE = 0.6  # seconds over which workers begin
DISTURBANCES = 20  # in a round: more, and nobody would ever come to an end
SECONDS = 120.0  # a round that takes longer hangs
OWN = {"timing.json", ".lock"}  # what differs from one attempt to the next


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("rounds", type=int)
    parser.add_argument("--latency-ms", type=float, default=5.0)
    parser.add_argument("--disturb", action="store_true")
    parser.add_argument("--bare", action="store_true")
    options = parser.parse_args()
    alone = options.work.resolve() / "alone"
    stages = (BARE,) if options.bare else STAGES
    if options.bare:
        in_fork(functools.partial(make_bare, alone))
    else:
        in_fork(functools.partial(prepare, alone))
        import_what_forks_do(alone)
    counts: Counter[str] = Counter()
    for number in range(options.rounds):
        stage = stages[number % len(stages)]
        root = options.work.resolve() / f"round-{number}"
        shutil.copytree(alone, root)
        for undone in stages[stages.index(stage) :]:
            shutil.rmtree(root / "run" / undone)
        counts += make_together(root, stage, random.Random(number), options.latency_ms, options.disturb)
        found, expected = files(root / "run" / stage), files(alone / "run" / stage)
        different = sorted(name for name in found | expected if found.get(name) != expected.get(name))
        assert not different, f"{root}: {stage}: {different}"
        shutil.rmtree(root)
    print(json.dumps(counts))


class BareStage(SharedStage):
    """Small files, one part each, and one derived from each beside the claims, as verdicts are."""

    name, kind = BARE, "rollouts"

    def check(self, run: ResolvedRun) -> list[str]:
        return []

    def plan(self, run: ResolvedRun) -> Plan:
        return Plan({}, {}, "proved")

    def workers(self, run: ResolvedRun) -> int:
        return 1

    def share(self, run: ResolvedRun, plan: Plan) -> None:
        works = []
        for place in (run.directory_of(BARE) / "a", run.directory_of(BARE) / "b"):
            place.mkdir(exist_ok=True)
            source, parts = run.directory_of(BARE) / PLAN_FILE, list[Derived]()
            for number in range(3):
                shard = place / f"{number}.x"
                parts.append(Derived(shard, source, functools.partial(_write_bare, str(shard.name))))
                parts.append(
                    Derived(place / CLAIMS / f"of-{number}", shard, functools.partial(_write_bare, "v"))
                )
            works.append(Work("bare", None, place, parts))
        make_parts(works)

    def commit(self, run: ResolvedRun, plan: Plan) -> Output:
        directory = run.directory_of(BARE)
        atomic_write_json(directory / "results.json", {"a": 1})
        names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*.x"))
        return Output([*names, "results.json"], {})


def _write_bare(text: str, path: Path, tick: Callable[[], None]) -> None:
    tick()
    path.write_text(text)


def make_bare(root: Path) -> int:
    run = SimpleNamespace(
        directory=root / "run",
        directory_of=lambda name: root / "run" / name,
        unchanged_manifest=lambda name, kind: load_manifest(root / "run" / name, kind),
        recipe=SimpleNamespace(allow_teacher_mismatch=False),
    )
    try:
        execute(BareStage(), cast("ResolvedRun", run))
    except LopdError as error:
        print(error)
        return error.exit_code
    return 0


def prepare(root: Path) -> int:
    """A run by one process, in shards of two samples."""
    from tests.pipeline import write_recipe  # imports transformers

    engine = {"batch_size": 2, "shard_samples": 2}
    sampling = {"max_new_tokens": 6}
    write_recipe(
        root,
        prompts={name: {"task": "arithmetic", "count": 12} for name in ("sft", "opd", "eval")},
        rollout={"sampling": sampling, "engine": engine},
        score={"engine": engine, "top_k": 3},
        evaluate={"sampling": sampling, "engine": engine},
        train=None,
    )
    os.chdir(root)
    return max(lopd([stage, "recipe.yaml"]) for stage in (*BEFORE, *STAGES))


def import_what_forks_do(root: Path) -> None:
    """Here, once, and not in each of them."""
    listed = root.parent / "modules"

    def lists() -> int:
        os.chdir(root)
        code = max(lopd([stage, "recipe.yaml"]) for stage in STAGES)
        for stage in STAGES:
            shutil.rmtree(root / "run" / stage)
        code = max(code, *(lopd([stage, "recipe.yaml"]) for stage in STAGES))
        listed.write_text("\n".join(sorted(sys.modules)))
        return code

    in_fork(lists)
    for name in listed.read_text().splitlines():
        with suppress(ImportError):  # some modules put themselves there under another name
            importlib.import_module(name)


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): b"" if path.is_dir() else path.read_bytes()
        for path in directory.rglob("*")
        if path.name not in OWN
    }


def make_together(
    root: Path, stage: str, rng: random.Random, latency_ms: float, disturb: bool
) -> Counter[str]:
    """What became of the workers of one round."""
    counts: Counter[str] = Counter()
    begin = [rng.uniform(0, LATE) for _ in range(WORKERS)]
    work = functools.partial(as_worker, root, stage, latency_ms, LEASE if disturb else None)
    pids = {fork(functools.partial(work, rng.randrange(1 << 30), late)) for late in begin}
    deadline, stopped = time.monotonic() + SECONDS, dict[int, float]()
    disturbances = DISTURBANCES if disturb else 0
    while pids:
        assert time.monotonic() < deadline, f"{root}: {stage}: {len(pids)} did not end"
        for pid in list(pids):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                pids.remove(pid)
                stopped.pop(pid, None)
                counts["ends"] += 1
                if code := os.waitstatus_to_exitcode(status):
                    counts["failed"] += 1
                    print(
                        f"{root}: {stage}: exit code {code}\n{(root / f'log-{pid}').read_text()}", flush=True
                    )
        for pid in [pid for pid, until in stopped.items() if time.monotonic() > until]:
            del stopped[pid]
            os.kill(pid, signal.SIGCONT)
        if disturbances and pids and rng.random() < 0.05:
            disturbances -= 1
            victim = rng.choice(sorted(pids))
            if rng.random() < 0.5:
                os.kill(victim, signal.SIGKILL)
                os.waitpid(victim, 0)
                pids.remove(victim)
                stopped.pop(victim, None)
                pids.add(fork(functools.partial(work, rng.randrange(1 << 30), 0.0)))
                counts["kills"] += 1
            elif victim not in stopped:
                os.kill(victim, signal.SIGSTOP)
                stopped[victim] = time.monotonic() + rng.choice([0.1, LEASE * 4])
                counts["stops"] += 1
        time.sleep(0.02)
    return counts


def as_worker(root: Path, stage: str, latency_ms: float, lease: float | None, seed: int, late: float) -> int:
    os.chdir(root)
    time.sleep(late)
    random.seed(seed)
    claims.POLL_SECONDS = 0.02
    if lease is not None:
        sharing.Claims = claims.Claims = functools.partial(claims.Claims, lease=lease)  # type: ignore[misc,assignment]
    tell(Faults(root, latency_ms, seed))
    with Path(f"log-{os.getpid()}").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            return make_bare(root) if stage == BARE else lopd([stage, "recipe.yaml"])
        except BaseException:  # noqa: BLE001 - every failure belongs in the log
            traceback.print_exc()
            return 1


def fork(body: Callable[[], int]) -> int:
    pid = os.fork()
    if pid == 0:
        end(body)
    return pid


def end(body: Callable[[], int]) -> NoReturn:
    code = 1
    try:
        code = body()
    finally:
        sys.stdout.flush()
        os._exit(code)


def in_fork(body: Callable[[], int]) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(fork(body), 0)[1])
    assert code == 0, f"exit code {code}"


if __name__ == "__main__":
    main()
