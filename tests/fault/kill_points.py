"""Kills a save at every point where it changes a file. Run with kill_points.c preloaded.

    LD_PRELOAD=LIBRARY python -m tests.fault.kill_points LIBRARY MODEL_DIR WORK_DIR WRITES

Each attempt is a fork of this process, which has imported everything. It recovers from the kill before
its own and checks what it finds; then it saves anew, to be killed at the next point. All points of a save
by one process, but of the writes every WRITES-th; and every SAMPLE-th point of each rank of two. The last
line is one JSON object: the points by kind of call, those killed at, and the step found after each kill.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed import TCPStore

from megatron_lopd.config import OptimizerConfig, ParallelConfig
from megatron_lopd.families.architecture import read_architecture
from megatron_lopd.mcore.model import build_model
from megatron_lopd.mcore.optimizer import Optimization, build_optimization
from megatron_lopd.mcore.process_groups import Ranks, model_parallel
from megatron_lopd.training.checkpoints import Checkpoint, Checkpoints, Progress
from megatron_lopd.training.consensus import on_rank_zero
from megatron_lopd.training.saving import Saver, load_checkpoint, newest_checkpoint

KINDS = ("open", "write", "fsync", "rename", "unlink", "mkdir", "truncate")
COUNT_ONLY = 1 << 60
SAMPLE = 12
Say = Callable[[Any], None]


@dataclass(frozen=True)
class Trial:
    """A model, where its checkpoints are, and the preloaded library."""

    shim: ctypes.CDLL
    model_dir: Path
    work: Path
    world_size: int

    def checkpoints(self, directory: str, keep: int = 2) -> Checkpoints:
        architecture = read_architecture(self.model_dir)
        return Checkpoints(self.work / directory, "a job", architecture, "proved", keep)

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(tensor=self.world_size, processes=self.world_size)

    def build(self) -> Optimization:
        model = build_model(read_architecture(self.model_dir), self.parallel, "fp32", seed=0)
        return build_optimization(model, OptimizerConfig(), "fp32", total_steps=10)


def main(library: str, model_dir: str, work: str, writes: str) -> None:
    """Enumerate, and print what was found."""
    torch.set_num_threads(1)
    shim = ctypes.CDLL(library)
    warm_up(Trial(shim, Path(model_dir), Path(work, "warm"), 1))
    found: dict[str, Any] = {}
    for world_size, chosen in ((1, partial(all_but_writes, every=int(writes))), (2, sampled)):
        trial = Trial(shim, Path(model_dir), Path(work, str(world_size)), world_size)
        in_forks(trial, lambda ranks, say, trial=trial: make_base(trial, ranks))
        for rank in range(world_size):
            found[f"rank {rank} of {world_size}"] = kill_everywhere(trial, rank, chosen)
    print(json.dumps(found))


def all_but_writes(kinds: list[str], every: int) -> list[int]:
    """The points, from 1, of every kind but writes, the last, and every `every`-th write."""
    written = [point for point, kind in enumerate(kinds, 1) if kind == "write"]
    left_out = set(written) - set(written[::every]) - {len(kinds)}
    return [point for point in range(1, len(kinds) + 1) if point not in left_out]


def sampled(kinds: list[str]) -> list[int]:
    return list(range(1, len(kinds) + 1, SAMPLE))


def kill_everywhere(trial: Trial, rank: int, chosen: Callable[[list[str]], list[int]]) -> dict[str, Any]:
    """Kill `rank` at the chosen points: all by kind, those killed at, and the step found after each kill."""

    def tried(point: int, after_kill: bool, dying: int | None) -> list[Any]:
        outputs = in_forks(
            trial, lambda ranks, say: attempt(trial, ranks, say, rank, point, after_kill), dying
        )
        return [json.loads(line) for line in outputs[rank].splitlines()]

    (kinds,) = tried(COUNT_ONLY, False, None)
    steps, points = [], chosen(kinds)
    for number, point in enumerate(points):
        steps += tried(point, number > 0, rank)
    last = in_forks(trial, lambda ranks, say: recover(trial, ranks, say))
    steps += [json.loads(last[rank])]
    return {"points": Counter(kinds), "killed at": points, "steps": steps}


def warm_up(trial: Trial) -> None:
    """Import here, once, what an attempt imports on first use. Found out in a fork: gloo survives none."""

    def imported(ranks: Ranks, say: Say) -> None:
        make_base(trial, ranks)
        start_over(trial)
        load_newest(trial, ranks)
        say(sorted(sys.modules))

    (names,) = in_forks(trial, imported)
    for name in set(json.loads(names)) - sys.modules.keys():
        with suppress(ImportError):  # some modules put themselves there under another name
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # Megatron-Core collects garbage in every save


def make_base(trial: Trial, ranks: Ranks) -> None:
    """Two whole checkpoints, and a damaged newer one that the save must replace."""
    optimization = trial.build()
    saver = Saver(trial.checkpoints("base", keep=3), optimization, ranks, torch.device("cpu"))
    for step in (1, 2, 3):
        fill(optimization, step)
        saver.start(Progress(step=step))
        saver.finish()
    if ranks.rank == 0:
        os.truncate(trial.work / "base" / "step_00000003" / "common.pt", 100)


def attempt(trial: Trial, ranks: Ranks, say: Say, rank: int, point: int, after_kill: bool) -> None:
    """Say what the kill before this left; then save step 3, `rank` being killed at `point` of it."""
    optimization = recover(trial, ranks, say) if after_kill else trial.build()
    on_rank_zero(lambda: start_over(trial))
    fill(optimization, 3)
    saver = Saver(trial.checkpoints("run"), optimization, ranks, torch.device("cpu"))
    trial.shim.kill_at(ctypes.c_long(point if ranks.rank == rank else COUNT_ONLY))
    saver.start(Progress(step=3))
    saver.finish()
    trial.shim.kill_at(ctypes.c_long(0))
    say([KINDS[trial.shim.kill_point_kind(point)] for point in range(1, trial.shim.kill_points() + 1)])


def start_over(trial: Trial) -> None:
    shutil.rmtree(trial.work / "run", ignore_errors=True)
    shutil.copytree(trial.work / "base", trial.work / "run")


def recover(trial: Trial, ranks: Ranks, say: Say) -> Optimization:
    """Load and check the newest whole checkpoint, and say its step; another save must then work."""
    step, optimization = load_newest(trial, ranks)
    say(step)
    fill(optimization, 4)
    saver = Saver(trial.checkpoints("run"), optimization, ranks, torch.device("cpu"))
    saver.start(Progress(step=4))
    saver.finish()
    assert newest_of(trial).progress.step == 4
    # Rank 0 lists, which is the one to empty the directory next.
    names = on_rank_zero(lambda: [path.name for path in (trial.work / "run").iterdir()])
    assert len(names) == 2, f"{names}: two are kept, and nothing else stays"
    return optimization


def newest_of(trial: Trial) -> Checkpoint:
    newest = newest_checkpoint(trial.checkpoints("run"), lambda text: None)
    assert newest is not None, "no whole checkpoint is left"
    return newest


def load_newest(trial: Trial, ranks: Ranks) -> tuple[int, Optimization]:
    newest = newest_of(trial)
    optimization = trial.build()
    step = load_checkpoint(newest, optimization, ranks).step
    values = {float(value) for tensor in state_of(optimization) for value in tensor.detach().aminmax()}
    assert values == {float(step)}, f"step {step} holds {values}"
    return step, optimization


@torch.no_grad()
def fill(optimization: Optimization, value: int) -> None:
    """Let every weight and moment say which step it is of."""
    for tensor in state_of(optimization):
        tensor.fill_(value)


def state_of(optimization: Optimization) -> list[torch.Tensor]:
    moments = [
        values[name]
        for part in optimization.optimizer.chained_optimizers
        for values in part.optimizer.state.values()
        for name in ("exp_avg", "exp_avg_sq")
    ]
    return [*optimization.chunks[0].parameters(), *moments]


def in_forks(trial: Trial, body: Callable[[Ranks, Say], Any], dying: int | None = None) -> list[str]:
    """Run `body` in a fork for each rank; what each said. Rank `dying` alone must be killed, by itself.

    The others are killed then, as a launcher does.
    """
    # The store is served from here, on a port that is taken the moment it is chosen.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children: dict[int, tuple[int, int]] = {}  # by rank: process id, and the pipe to read from
    for rank in range(trial.world_size):
        receive, send = os.pipe()
        pid = os.fork()
        if pid == 0:
            run_child(trial, body, rank, store.port, send)
        os.close(send)
        children[rank] = pid, receive
    said = [""] * trial.world_size
    try:
        for rank in range(trial.world_size) if dying is None else [dying]:
            pid, receive = children.pop(rank)
            with os.fdopen(receive) as stream:
                said[rank] = stream.read()
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            assert code == (0 if dying is None else -signal.SIGKILL), f"rank {rank} ended with {code}"
    finally:
        for pid, receive in children.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(receive)
    return said


def run_child(trial: Trial, body: Callable[[Ranks, Say], Any], rank: int, port: int, send: int) -> NoReturn:
    def say(value: Any) -> None:
        os.write(send, json.dumps(value).encode() + b"\n")

    if trial.world_size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(trial.world_size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
        os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True")
    try:
        with model_parallel(trial.parallel, seed=0) as ranks:
            body(ranks, say)
    except BaseException:  # noqa: BLE001 - every failure belongs in the report
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
