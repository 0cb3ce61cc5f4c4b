from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lopd.config import TrainConfig
from megatron_lopd.errors import ConfigError, DataError, LoggerError
from megatron_lopd.loggers import METRICS_FILE, Logger, Loggers, read_steps
from megatron_lopd.registry import LOGGERS
from megatron_lopd.runtime import display as progress
from megatron_lopd.runtime.display import Pace, ProgressDisplay, duration


def lines(directory: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in (directory / METRICS_FILE).read_text().splitlines()]


def test_reopening_at_a_step_drops_what_came_after_it(tmp_path: Path) -> None:
    log = Loggers(["jsonl", "tensorboard"])
    log.open(tmp_path, 0, "train")
    for step in (1, 2, 3):
        log.write({"step": step, "loss": math.nan if step == 2 else 0.5})
    log.close()
    with (tmp_path / METRICS_FILE).open("a") as stream:
        stream.write('{"step": 4, "lo')  # a kill in the middle of a line

    log = Loggers(["jsonl", "tensorboard"])
    log.open(tmp_path, 2, "train")
    log.write({"step": 3, "loss": 0.25})
    log.sync()
    log.close()
    assert lines(tmp_path) == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": None},
        {"step": 3, "loss": 0.25},
    ]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_line_being_written_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_steps(path) == [{"step": 1}]


DAMAGED = ["", "{", "[1]", "{}", '{"step": "2"}', '{"step": NaN}', "[" * 100_000, "\xff"]
DAMAGED += [
    '{"step": 2, "loss": NaN}',
    '{"step": 2, "loss": "0"}',
    '{"step": 2, "loss": 1e999}',
    '{"step": true}',
]


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_is_told_by_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / METRICS_FILE
    path.write_bytes(f'{{"step": 1}}\n{line}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: damaged"):
        read_steps(path)


class Broken(Logger):
    name, caption = "broken", "nowhere"
    closed = False

    def open(self, directory: Path, resumed_step: int, job: str) -> None:
        pass

    def write(self, metrics: Mapping[str, float]) -> None:
        raise RuntimeError("no route\nto host")

    def close(self) -> None:
        Broken.closed = True


def test_a_logger_that_fails_is_one_line_and_the_others_are_closed(tmp_path: Path) -> None:
    LOGGERS.add(Broken)
    log = Loggers(["jsonl", "broken"])
    log.open(tmp_path, 0, "train")
    with pytest.raises(LoggerError, match="the logger broken cannot write: no route to host: mend"):
        log.write({"step": 1, "loss": 0.5})
    log.close()
    assert Broken.closed
    assert lines(tmp_path) == [{"step": 1, "loss": 0.5}]
    (tmp_path / "file").touch()
    with pytest.raises(LoggerError, match="the logger jsonl cannot write: "):
        Loggers(["jsonl"]).open(tmp_path / "file", 0, "train")


def test_what_the_report_reads_is_always_written() -> None:
    with pytest.raises(ConfigError, match=r"train\.loggers: jsonl is not among them, and report and status"):
        TrainConfig(steps=1, loggers=("tensorboard",))


@given(st.integers(0, 10**6))
def test_durations_read_back(seconds: int) -> None:
    units = {"h": 3600, "m": 60, "s": 1}
    total, number = 0, ""
    for character in duration(seconds):
        if character in units:
            total, number = total + int(number) * units[character], ""
        else:
            number += character
    assert total == seconds if seconds < 3600 else 0 <= seconds - total < 60


def test_plain_lines_tell_detail_and_no_time_left_that_nothing_is_known_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", 0.0)
    display = ProgressDisplay("sft", "step")
    display.begin(10, 12)
    display.update(11, "loss 1.5")
    display.update(12, "loss 1.2\x1b[2J")
    said = capsys.readouterr().err.splitlines()
    assert said == ["sft: step 11/12  loss 1.5", "sft: step 12/12  loss 1.2\\x1b[2J"]


@pytest.mark.parametrize(
    ("loading", "between", "batch"), [(60, 3, 64), (0, 0.3, 1), (300, 20, 4096), (0, 0.01, 1), (90, 2, 1)]
)
def test_the_time_left_is_right_from_the_first_that_is_said(
    loading: float, between: float, batch: int
) -> None:
    """Of batches, each given at once, one after the other, behind a start that is no part of the rate."""
    now = 0.0
    pace = Pace(lambda: now)
    pace.start(7)
    now, done, said = loading, 7, 0
    for _ in range(40 if between >= 1 else 2_000):
        now += between
        for _ in range(batch):
            done += 1
            now += 1e-6
            pace.count(done)
            if pace.per_second is not None:
                said += 1
                assert pace.per_second == pytest.approx(batch / between, rel=0.02)
    assert said
