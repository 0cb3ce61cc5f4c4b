"""Processes that run campaigns: each imports what the attacks use, once, and forks every attempt."""

from __future__ import annotations

import importlib
import multiprocessing as mp
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from tqdm import tqdm

from tests.attacks.attack import kinds
from tests.attacks.campaign import Campaign, Tally
from tests.forks import PRELOADED
from tests.shims.file_faults import build, preloaded

# In every worker, before it imports torch.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
_CONTEXT = mp.get_context("spawn")
_END = None


def campaigns(
    place: Path, rounds: Iterable[tuple[str, int]], *, examples: int, processes: int, minutes: float | None
) -> Iterator[tuple[str, Tally]]:
    """(kind, what came of it) of each round (kind, seed), as they end: until `rounds` or `minutes` are over.

    `examples` attempts a round; 0: as many as the kind says. The finished run that the worlds are copies of
    is made first, in `place`, whose path has no links in it.
    """
    waiting, workers = iter(rounds), dict[Connection, BaseProcess]()
    finished = place / "finished"
    first, process = _started(finished, place / "worker-0", examples)
    workers[first] = process
    first.send("make the run")
    assert first.recv() == "made"
    until = None if minutes is None else time.monotonic() + 60 * minutes
    for number in range(1, processes):
        connection, process = _started(finished, place / f"worker-{number}", examples)
        workers[connection] = process
    for connection in workers:
        connection.send(until)
        connection.send(next(waiting, _END))
    while workers:
        for connection in wait(list(workers)):
            assert isinstance(connection, Connection)
            try:
                yield connection.recv()
            except EOFError:
                process = workers.pop(connection)
                process.join()
                assert process.exitcode == 0, f"a worker of the attacks ended with {process.exitcode}"
                continue
            over = until is not None and time.monotonic() > until
            connection.send(_END if over else next(waiting, _END))


def _started(finished: Path, place: Path, examples: int) -> tuple[Connection, BaseProcess]:
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_work, args=(theirs, finished, place, examples), daemon=True)
    before = dict(os.environ)
    os.environ |= ENVIRONMENT | preloaded(build(place.parent))  # it does nothing until it is told to
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    theirs.close()
    return ours, process


def _work(connection: Connection, finished: Path, place: Path, examples: int) -> None:
    for module in PRELOADED:
        importlib.import_module(module)
    tqdm.get_lock()  # once, here: each attempt would leave a semaphore of its own behind
    made: dict[str, Campaign] = {}
    attacks = kinds()
    until = connection.recv()
    if until == "make the run":
        _make_in_child(finished)
        connection.send("made")
        until = connection.recv()
    while (asked := connection.recv()) is not _END:
        kind, seed = asked
        if kind not in made:
            made[kind] = Campaign(attacks[kind], finished, place)
        connection.send((kind, made[kind].run(seed, examples or attacks[kind].examples, until)))


def _make_in_child(root: Path) -> None:
    """A whole run of tiny models; its recipe's paths are relative to it."""
    child = os.fork()
    if not child:
        code = 1
        try:
            code = _make(root)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert status == 0, (
        f"the run that the attacks are on could not be made: {(root / 'log').read_text()[-2000:]}"
    )


def _make(root: Path) -> int:
    from megatron_lopd.cli import main
    from tests.pipeline import write_recipe

    root.mkdir(parents=True)
    os.environ["LOPD_CACHE"] = str(root / "cache")
    with (root / "log").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        recipe = write_recipe(root)
        os.chdir(root)
        return main(["run", recipe.name])
