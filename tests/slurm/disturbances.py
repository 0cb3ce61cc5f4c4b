"""What a cluster does to a job in the middle of its stage.

The ranks are held still (SIGSTOP) until the disturbance has reached one: the stages of a tiny model are over
sooner than SLURM acts.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.slurm.submission import MINUTES, NODES, Run

STEPS, CHECKPOINT_EVERY = 20, 4
TRAINING = ("sft", "train")


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "generate": lambda run: any((run / "generate").glob("rollouts-*.arrow")),
    "sft": lambda run: _lines(run / "sft/metrics.jsonl") >= CHECKPOINT_EVERY + 2,
    "rollout": lambda run: any((run / "rollout").glob("rollouts-*.arrow")),
    "score": lambda run: any((run / "score").glob("scores-*.arrow")),
    "train": lambda run: _lines(run / "train/metrics.jsonl") >= CHECKPOINT_EVERY + 2,
    "export": lambda run: (run / "export").exists(),
    "evaluate": lambda run: (run / "evaluate/sft").exists(),
}


def _requeue(run: Run, stage: str, ranks: list[psutil.Process]) -> None:
    run.slurm.ask("scontrol", "requeue", run.jobs[stage])


def _usr1(run: Run, stage: str, ranks: list[psutil.Process]) -> None:
    run.slurm.ask("scancel", "--signal=USR1", run.jobs[stage])


def _term(run: Run, stage: str, ranks: list[psutil.Process]) -> None:
    run.slurm.ask("scancel", "--signal=TERM", run.jobs[stage])


def _kill(run: Run, stage: str, ranks: list[psutil.Process]) -> None:
    ranks[-1].kill()


def _preempt(run: Run, stage: str, ranks: list[psutil.Process]) -> None:
    run.slurm.ask(
        "sbatch", "--partition=urgent", "--exclusive", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1"
    )


def _time_limit(run: Run, stage: str, ranks: list[psutil.Process]) -> None:
    """Limits are of whole minutes, and SLURM looks at them twice a minute: leave it 40 s."""
    seconds = time.time() - ranks[0].create_time() + 40
    run.slurm.ask("scontrol", "update", f"JobId={run.jobs[stage]}", f"TimeLimit={math.ceil(seconds / 60)}")


KINDS: dict[str, Callable[[Run, str, list[psutil.Process]], None]] = {
    "scontrol requeue": _requeue,
    "scancel USR1": _usr1,
    "scancel TERM": _term,
    "kill -9": _kill,
    "pre-emption": _preempt,
    "time limit": _time_limit,
}


def disturb(run: Run, stage: str, kind: str) -> None:
    """Let `stage` get to its moment, disturb it, and see that the next attempt goes on from there.

    At most one shard is made again, or one checkpoint interval. Returns when the stage is done.
    """
    attempts = run.attempts(stage)
    run.wait_for(f"{stage} to start", lambda: len(run.ranks(stage)) == NODES.get(stage, 1))
    ranks = run.ranks(stage)
    run.wait_for(f"{stage} to come to its moment", lambda: MOMENTS[stage](run.directory))
    for rank in ranks:
        rank.suspend()
    shards, steps = _shards(run, stage), _lines(run.directory / stage / "metrics.jsonl")
    KINDS[kind](run, stage, ranks)
    run.wait_for(f"{kind} to reach {stage}", lambda: any(map(_reached, ranks)))
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.resume()
    if kind == "time limit":
        run.wait_for(f"{stage} to be queued again", lambda: run.slurm.state(run.jobs[stage]) == "PENDING")
        run.slurm.ask("scontrol", "update", f"JobId={run.jobs[stage]}", f"TimeLimit={MINUTES}")
    run.finish(stage)
    assert run.attempts(stage) > max(attempts, 1), f"{kind} did not end {stage}\n{run.logs(stage)}"
    assert shards.items() <= _shards(run, stage).items(), f"{stage} made a whole shard again after {kind}"
    if stage in TRAINING:
        resumed = int(run.logs(stage).rpartition("resumed after step ")[2].split()[0])
        assert steps - resumed <= CHECKPOINT_EVERY, run.logs(stage)


def _shards(run: Run, stage: str) -> dict[str, tuple[int, int]]:
    found = {path: path.stat() for path in (run.directory / stage).rglob("*.arrow") if path.name[0] != "."}
    return {str(path): (stat.st_ino, stat.st_mtime_ns) for path, stat in found.items()}


def _reached(rank: psutil.Process) -> bool:
    """Whether the process has ended, or a signal waits for it (Linux's /proc/PID/status)."""
    try:
        status = Path(f"/proc/{rank.pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    pending = [line.split()[1] for line in status.splitlines() if line.startswith(("SigPnd", "ShdPnd"))]
    return "State:\tZ" in status or any(int(mask, 16) for mask in pending)
