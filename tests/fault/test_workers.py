"""Workers that share a stage: killed, paused, stopped and failing, they commit what one alone would have."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_lopd.cli import main
from megatron_lopd.engines.protocol import Prompted
from megatron_lopd.engines.transformers_engine import TransformersEngine
from megatron_lopd.errors import EngineDied
from megatron_lopd.pipeline import workers as sharing
from megatron_lopd.runtime import claims as claims_module
from megatron_lopd.runtime.claim_files import read_claims
from megatron_lopd.runtime.claims import Claims
from tests.forks import CONTEXT
from tests.pipeline import write_recipe

WORKERS = 4
SAMPLES, SHARD = 120, 2
SECONDS = 120.0


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run through rollout and score by one process at a time, in many small shards; never changed."""
    root = tmp_path_factory.mktemp("alone")
    engine = {"batch_size": SHARD, "shard_samples": SHARD}
    sampling = {"max_new_tokens": 12}
    write_recipe(
        root,
        prompts={"sft": {"task": "arithmetic", "count": 40}, "opd": {"task": "arithmetic", "count": SAMPLES}},
        rollout={"sampling": sampling, "engine": engine},
        score={"engine": engine, "top_k": 3},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for stage in ("generate", "sft", "rollout", "score"):
            assert main([stage, "recipe.yaml"]) == 0
    return root


@pytest.fixture
def root(sampled: Path, tmp_path: Path) -> Path:
    """A copy of it, before rollout."""
    copy = shutil.copytree(sampled, tmp_path / "copy")
    undo(copy, "rollout", "score")
    return copy


def undo(root: Path, *stages: str) -> None:
    for stage in stages:
        shutil.rmtree(root / "run" / stage)


def files(directory: Path) -> dict[str, bytes]:
    skipped = {"timing.json", ".lock"}
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name not in skipped
    }


def work(root: Path, stage: str, lease: float | None = None, slow: bool = False, hangs: bool = False) -> None:
    """A worker process: as `lopd STAGE recipe.yaml` started in `root`. It ends with that exit code."""
    os.chdir(root)
    if slow:
        generate = TransformersEngine.generate

        def slowly(*arguments: Any) -> Iterator[Any]:
            for completion in generate(*arguments):
                Path(f"in-{stage}").touch()
                time.sleep(1e6 if hangs else 0.5)
                yield completion

        TransformersEngine.generate = slowly  # type: ignore[method-assign]
    claims_module.POLL_SECONDS = 0.02
    if hangs:
        sharing.LEASE_SECONDS = 0.5
    if lease is not None:
        sharing.Claims = functools.partial(Claims, lease=lease)  # type: ignore[assignment,misc]
    overrides = [f"{stage}.engine.patience_minutes=0.01"] if hangs else []
    with Path("log").open("a") as log, redirect_stdout(log), redirect_stderr(log):
        code = main([stage, "recipe.yaml", *overrides])
    sys.exit(code)


def start(root: Path, stage: str, *options: Any) -> Any:
    process = CONTEXT.Process(target=work, args=(root, stage, *options), daemon=True)
    process.start()
    return process


def said(root: Path) -> str:
    return (root / "log").read_text()[-2000:]


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.002)


def in_a_shard(root: Path, stage: str) -> Callable[[], bool]:
    """Whether a worker that `work` slowed down is in the middle of a shard."""
    return lambda: (root / f"in-{stage}").exists()


def finish(process: Any) -> int:
    process.join(SECONDS)
    assert process.exitcode is not None, "it did not end"
    return int(process.exitcode)


@pytest.mark.parametrize("wanted", [25, pytest.param(100, marks=pytest.mark.nightly)])
def test_that_many_kills_change_no_byte(root: Path, sampled: Path, wanted: int) -> None:
    """Four workers at a time, one killed with -9 at a random moment and replaced, again and again."""
    rng = random.Random(0)
    kills = 0
    while kills < wanted:
        for stage in ("rollout", "score"):
            workers = [start(root, stage) for _ in range(WORKERS)]
            for victim in moments(root / "run" / stage, rng):
                if workers[victim].is_alive():
                    os.kill(workers[victim].pid, signal.SIGKILL)
                    workers[victim].join()
                    kills += 1
                    workers[victim] = start(root, stage)
            assert [finish(worker) for worker in workers] == [0] * WORKERS, said(root)
            assert files(root / "run" / stage) == files(sampled / "run" / stage)
        if kills < wanted:
            undo(root, "rollout", "score")


def moments(directory: Path, rng: random.Random) -> Iterator[int]:
    """Random moments until the artifact in `directory` is committed, each with the number of a worker.

    In every other interval a shard is published, on average: on the slowest machine the work goes on.
    """

    def shards() -> int:
        return len(list(directory.glob("*.arrow")))

    while True:
        wanted = shards() + rng.randrange(2)
        while shards() < wanted and not (directory / "manifest.json").exists():
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        if (directory / "manifest.json").exists():
            return
        yield rng.randrange(WORKERS)


def test_one_that_was_paused_is_taken_over_and_disturbs_nothing(root: Path, sampled: Path) -> None:
    paused = start(root, "rollout", 0.5, True)
    wait_for(in_a_shard(root, "rollout"))
    os.kill(paused.pid, signal.SIGSTOP)
    try:
        assert finish(start(root, "rollout", 0.5)) == 0
        assert files(root / "run" / "rollout") == files(sampled / "run" / "rollout")
    finally:
        os.kill(paused.pid, signal.SIGCONT)
    assert finish(paused) == 0, said(root)
    assert files(root / "run" / "rollout") == files(sampled / "run" / "rollout")


def test_one_whose_engine_hangs_ends_and_its_shard_is_made_by_another(root: Path, sampled: Path) -> None:
    """Alive it is, and its heartbeats come: it would hold the shard for ever."""
    hanging = start(root, "rollout", 0.5, True, True)
    wait_for(in_a_shard(root, "rollout"))
    assert finish(start(root, "rollout")) == 0
    assert finish(hanging) == 75
    assert "its engine hangs: the shard is left to the other workers" in said(root)
    assert files(root / "run" / "rollout") == files(sampled / "run" / "rollout")


def test_a_stop_signal_ends_a_worker_with_75_and_its_shard_is_free(root: Path, sampled: Path) -> None:
    claims = root / "run" / "rollout"
    for number in (signal.SIGTERM, signal.SIGUSR1):
        worker = start(root, "rollout", None, True)
        wait_for(in_a_shard(root, "rollout"))
        os.kill(worker.pid, number)
        assert finish(worker) == 75
        assert {states[-1].status for states in read_claims(claims).values()} == {"released"}
        (root / "in-rollout").unlink()
    assert "rollout: stopped on request" in said(root)
    assert finish(start(root, "rollout")) == 0
    assert files(claims) == files(sampled / "run" / "rollout")


@dataclass
class Deaths:
    """When the engine here dies: asked at every part it is given, by the id of the part's first sample."""

    at: Callable[[str], bool]
    count: int = 0


@pytest.fixture
def deaths(monkeypatch: pytest.MonkeyPatch) -> Deaths:
    deaths = Deaths(at=lambda sample: False)
    generate = TransformersEngine.generate

    def dying(self: TransformersEngine, requests: Sequence[Prompted], *rest: Any) -> Any:
        if deaths.at(requests[0].sample_id):
            deaths.count += 1
            raise EngineDied("the student's process was killed by SIGKILL")
        return generate(self, requests, *rest)

    monkeypatch.setattr(TransformersEngine, "generate", dying)
    monkeypatch.setattr(claims_module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(sharing, "Claims", functools.partial(Claims, backoff=0.05))
    return deaths


@pytest.mark.parametrize("pattern", ["110", "01" * 10], ids=["twice in a row", "now and then"])
def test_an_engine_that_dies_is_tried_again(
    root: Path,
    sampled: Path,
    deaths: Deaths,
    pattern: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(root)
    coming = iter(pattern)
    deaths.at = lambda sample: next(coming, "0") == "1"
    assert main(["rollout", "recipe.yaml"]) == 0
    assert deaths.count == pattern.count("1")
    assert capsys.readouterr().err.count("killed by SIGKILL: to be tried again") == deaths.count
    assert files(root / "run" / "rollout") == files(sampled / "run" / "rollout")


def test_a_shard_that_always_fails_ends_every_worker_with_a_line(
    root: Path, deaths: Deaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once all others are made. Started again, it has its three tries again."""
    monkeypatch.chdir(root)
    first: list[str] = []

    def poison(sample: str) -> bool:
        first.append(sample)
        return sample == first[0]

    deaths.at = poison
    for runs in (1, 2):
        assert main(["rollout", "recipe.yaml"]) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert re.search(
            r"run/rollout/rollouts-\d{5}\.arrow: failed 3 times, the last on .* \(pid \d+\)", line
        )
        assert line.endswith("the student's process was killed by SIGKILL")
        assert deaths.count == 3 * runs
        assert len(list((root / "run" / "rollout").glob("rollouts-*.arrow"))) == SAMPLES // SHARD - 1
    deaths.at = lambda sample: False
    assert main(["rollout", "recipe.yaml"]) == 0


def test_an_engine_that_always_dies_ends_its_worker_at_the_third_part(
    root: Path, deaths: Deaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    deaths.at = lambda sample: True
    for runs in (1, 2):
        assert main(["rollout", "recipe.yaml"]) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert re.search(r"run/rollout/rollouts-\d{5}\.arrow: the last of 3 that failed here with none", line)
        assert line.endswith("the student's process was killed by SIGKILL")
        assert deaths.count == 3 * runs
    deaths.at = lambda sample: False
    assert main(["rollout", "recipe.yaml"]) == 0


def test_status_tells_who_is_at_work_on_what(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    worker = start(root, "rollout", None, True)
    wait_for(in_a_shard(root, "rollout"))
    os.kill(worker.pid, signal.SIGSTOP)
    before = files(root / "run")
    assert main(["status", "recipe.yaml"]) == 0
    assert files(root / "run") == before, "status writes nothing"
    lines = capsys.readouterr().out.splitlines()
    stages = {line.split()[0]: line for line in lines if not line.startswith(" ")}
    assert stages["sft"].startswith("sft        committed:")
    assert f"of {SAMPLES // SHARD} shards" in stages["rollout"]
    assert f"of {SAMPLES} samples; workers: 1" in stages["rollout"]
    assert any(f"pid {worker.pid}: rollouts-" in line for line in lines)
    assert stages["score"].split()[1:] == ["to", "do"]
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert main(["status", "recipe.yaml"]) == 0
    out = capsys.readouterr().out
    assert "rollout    begun, nobody at work: " in out
    assert "the process is gone, its shard waits to be taken over" in out


def test_several_workers_on_this_machine_are_started_by_a_setting(
    root: Path, sampled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    assert main(["rollout", "recipe.yaml", "rollout.engine.workers=2"]) == 0
    assert files(root / "run" / "rollout") == files(sampled / "run" / "rollout")
    manifest = json.loads((root / "run/rollout/manifest.json").read_text())
    assert "workers" not in manifest["config"]["engine"], "who shares the work decides nothing"
