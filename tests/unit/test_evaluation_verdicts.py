"""Shards are graded by whoever works, once each, and what is graded survives a kill."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lopd.data.dataset import shard_name
from megatron_lopd.data.records import Rollout
from megatron_lopd.data.schemas import ROLLOUTS
from megatron_lopd.data.shards import ShardReader, write_shard
from megatron_lopd.errors import DataError, StopRequested
from megatron_lopd.evaluation import verdicts
from megatron_lopd.evaluation.grading import _grades
from megatron_lopd.evaluation.verdicts import Marker
from megatron_lopd.graders.grader import Grader, Verdict
from megatron_lopd.pipeline.workers import Work, make_parts
from megatron_lopd.prompts.prompt import Prompt
from megatron_lopd.runtime.claim_files import CLAIMS
from tests.unit.test_data_chat import IDS, model_dir

SHARDS, PROMPTS = 3, [Prompt(f"p{n}", ({"role": "user", "content": f"{n}+1"},)) for n in range(6)]
PROMPT, LOG_PROBS = np.array([1, 2], np.int32), -np.ones(2, np.float32)


class Counting(Grader):
    """Keeps what it was asked, and stops at the question that it is told."""

    asked: list[str]
    stop_at = ""

    def __enter__(self) -> Counting:
        return self

    def __exit__(self, *unused: object) -> None:
        pass

    def require(self, prompts: object) -> None:
        pass

    def grade(self, prompt: Prompt, response: str) -> Verdict:
        if prompt.id == self.stop_at:
            raise StopRequested("enough")
        self.asked.append(prompt.id)
        return Verdict(response == f"={int(prompt.id[1:]) + 1}", answer=response)


@pytest.fixture
def marker(tmp_path: Path) -> Marker:
    return Marker(PROMPTS, Path(model_dir(tmp_path / "voice")), trust_remote_code=False)


@pytest.fixture
def work(tmp_path: Path, marker: Marker, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Shares the grading of three shards of two responses, until the grader stops at a prompt."""
    for number in range(SHARDS):
        chosen = range(2 * number, 2 * number + 2)
        records = [
            Rollout(
                f"p{n}/0", PROMPT, np.array([IDS["="], IDS[str(1 + n // 2 * 2)]], np.int32), "stop", LOG_PROBS
            )
            for n in chosen
        ]
        write_shard(tmp_path / shard_name(ROLLOUTS, number), ROLLOUTS, records)
    shards = sorted(tmp_path.glob("*.arrow"))
    monkeypatch.setattr(Counting, "asked", [], raising=False)
    monkeypatch.setattr(verdicts, "open_grader", lambda name: Counting())

    def grade(stop_at: str) -> None:
        monkeypatch.setattr(Counting, "stop_at", stop_at)
        make_parts([Work("grade", None, tmp_path, [marker.part(each, "any", tmp_path) for each in shards])])

    return grade


def test_each_response_is_graded_once_though_the_work_is_stopped(
    work: Callable[[str], None], tmp_path: Path, marker: Marker
) -> None:
    with pytest.raises(StopRequested):
        work("p4")
    work("")
    assert sorted(Counting.asked) == [prompt.id for prompt in PROMPTS]
    shards = sorted(tmp_path.glob("*.arrow"))
    kept = marker.by_prompt(shards, Refusing(), tmp_path)
    assert [verdict.right for (verdict,) in kept.values()] == [True, False] * SHARDS
    assert kept == marker.by_prompt(shards, Counting(), tmp_path / "elsewhere"), "as graded anew"


class Refusing(Counting):
    def grade(self, *unused: Any) -> Verdict:
        raise AssertionError("graded again")


def test_a_flipped_verdict_is_refused(work: Callable[[str], None], tmp_path: Path, marker: Marker) -> None:
    work("")
    path = tmp_path / CLAIMS / "verdicts-rollouts-00001"
    path.write_text(path.read_text().replace("false", "true", 1))
    with pytest.raises(DataError, match=r"verdicts-rollouts-00001: damaged: remove it"):
        marker.by_prompt(sorted(tmp_path.glob("*.arrow")), Refusing(), tmp_path)


def test_the_entropy_of_long_answers_takes_the_memory_of_one(tmp_path: Path) -> None:
    tokens, count = 100_000, 40
    log_probs = np.linspace(-2, 0, tokens, dtype=np.float16).astype(np.float32)  # as it is kept
    records = [
        Rollout(f"p{n}/0", PROMPT, np.ones(tokens, np.int32), "stop" if n else "length", log_probs)
        for n in range(count)
    ]
    write_shard(tmp_path / "shard.arrow", ROLLOUTS, records)
    answers = ShardReader(ROLLOUTS, [tmp_path / "shard.arrow"])
    given = {f"p{n}": [Verdict(True)] for n in range(count)}
    tracemalloc.start()
    try:
        found = _grades(answers, given, given)
        assert tracemalloc.get_traced_memory()[1] < 20 * tokens
    finally:
        tracemalloc.stop()
    assert found.cut == 1 / count
    assert found.entropy == pytest.approx(1.0, abs=1e-3)
