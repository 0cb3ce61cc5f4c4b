"""Processes that run campaigns: forks of a server that has imported what the attacks use, one thread each."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tests.attacks.attack import kinds
from tests.attacks.campaign import Campaign, Tally
from tests.forks import CONTEXT

_END = None


def campaigns(
    place: Path, rounds: Iterable[tuple[str, int]], *, examples: int, processes: int, minutes: float | None
) -> Iterator[tuple[str, Tally]]:
    """(kind, what came of it) of each round (kind, seed), as they end: until `rounds` or `minutes` are over.

    The finished run that the worlds are made of is made first, in `place`.
    """
    finished = place / "finished"
    maker = CONTEXT.Process(target=_make_finished, args=(finished, dict(os.environ)))
    maker.start()
    maker.join()
    assert maker.exitcode == 0, "the run that the attacks are on could not be made"
    until = None if minutes is None else time.monotonic() + 60 * minutes
    waiting, workers = iter(rounds), dict[Connection, Any]()
    for number in range(processes):
        ours, theirs = CONTEXT.Pipe()
        arguments = (theirs, finished, place / f"worker-{number}", examples, until, dict(os.environ))
        process = CONTEXT.Process(target=_work, args=arguments)
        process.start()
        theirs.close()
        workers[ours] = process
        ours.send(next(waiting, _END))
    while workers:
        for ours in wait(list(workers)):
            assert isinstance(ours, Connection)
            try:
                yield ours.recv()
            except EOFError:
                process = workers.pop(ours)
                process.join()
                assert process.exitcode == 0, f"a worker of the attacks ended with {process.exitcode}"
                continue
            over = until is not None and time.monotonic() > until
            ours.send(_END if over else next(waiting, _END))


def _make_finished(root: Path, environment: dict[str, str]) -> None:
    """A whole run of tiny models, which every world is a copy of; its recipe's paths are relative to it."""
    from megatron_lopd.cli import main
    from tests.pipeline import write_recipe

    os.environ |= environment
    root.mkdir(parents=True)
    with (root / "log").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        recipe = write_recipe(root)
        os.environ["LOPD_CACHE"] = str(root / "cache")
        os.chdir(root)
        code = main(["run", recipe.name])
    raise SystemExit(code)


def _work(
    connection: Connection,
    finished: Path,
    place: Path,
    examples: int,
    until: float | None,
    environment: dict[str, str],
) -> None:
    os.environ |= environment
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    tqdm.get_lock()  # once, here: each attempt would leave a semaphore of its own behind
    made: dict[str, Campaign] = {}
    attacks = kinds()
    while (asked := connection.recv()) is not _END:
        kind, seed = asked
        if kind not in made:
            made[kind] = Campaign(attacks[kind], finished, place)
        number = examples or attacks[kind].examples
        connection.send((kind, made[kind].run(seed, number, until)))
