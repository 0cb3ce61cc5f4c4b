"""The miniature study: every condition runs in short, and the committed pages say what its results say."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_lopd.pipeline.execute import execute
from megatron_lopd.pipeline.resolved import ResolvedRun
from megatron_lopd.stages.table import GENERATE, ROLLOUT, SFT

ROOT = Path(__file__).parents[2]
MINIATURE = ROOT / "examples" / "miniature"
METHODS = {
    "sft",
    "sft_continued",
    "sampled_reverse_kl",
    "sampled_reverse_kl+clipped",
    "topk_reverse_kl",
    "topk_forward_kl",
    "refresh",
    "online_sampled_reverse_kl",
    "online_topk_reverse_kl",
    "fixed_negative",
}
KEYS = {"start", "teacher", "method", "k", "seed", "sampled", "greedy", "entropy", "length", "seconds"}
KEYS |= {"teacher_tokens", "stopped_by_guard"}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"miniature_{name}", MINIATURE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_short(directory: Path) -> bytes:
    """The results that the short study writes, run as a user would."""
    results = directory / "results.json"
    command = [sys.executable, "examples/miniature/study.py", "--short", "--run-dir", str(directory)]
    done = subprocess.run(
        [*command, "--results", str(results)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    logs = "\n".join(path.read_text()[-2000:] for path in sorted(directory.glob("*.log")))
    assert done.returncode == 0, logs
    return results.read_bytes()


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("study")
    return directory, json.loads(run_short(directory))


@pytest.mark.nightly  # some fifty runs of the whole pipeline, two at a time
@pytest.mark.timeout(900)
def test_every_condition_runs_and_a_finished_study_is_only_read(short: tuple[Path, dict[str, Any]]) -> None:
    directory, results = short
    assert {run["method"] for run in results["conditions"]} == METHODS
    for run in results["conditions"]:
        assert run.keys() >= KEYS
        assert run["seconds"].keys() == {"rollout", "teacher", "train"}
        assert (run["teacher_tokens"] > 0) == (not run["method"].startswith("sft"))
        assert ("unguarded" in run) == run["stopped_by_guard"]
    # A run made again would have other seconds; the inconsistent ones were refused without the override.
    assert json.loads(run_short(directory)) == results


def test_a_student_goes_through_the_study(tmp_path: Path) -> None:
    """One condition of each way to be measured, of two teachers: the rest is nightly."""
    study = load("study")
    measured = {"equals": ("sft", "topk_reverse_kl", "online_sampled_reverse_kl"), "terse": ("refresh",)}
    for scored, names in measured.items():
        runner = study.CellRunner(study.Cell("strong", "equals", scored, 1), tmp_path, short=True)
        base = ResolvedRun(runner.recipe(runner.base, teacher="equals"))
        for stage in (GENERATE, SFT, ROLLOUT):
            execute(stage, base)
        chosen = {each.method: each for each in runner.cell.conditions(short=True)}
        for name in names:
            runner.run_condition(chosen[name])
            entry = json.loads((runner.directory / chosen[name].name / "entry.json").read_text())
            assert entry.keys() >= KEYS


def test_figures_and_tables_are_drawn_from_any_results(tmp_path: Path) -> None:
    draw = load("draw")
    results = json.loads((MINIATURE / "results.json").read_text())
    results["seeds"] = results["seeds"][:1]
    results["conditions"] = [run for run in results["conditions"] if run["seed"] in results["seeds"]]
    study = draw.Study(results)
    for figure in (draw.accuracy_figure(study), draw.time_figure(study)):
        figure.savefig(tmp_path / "figure.svg")
    table = draw.summary_table(study)
    assert all(draw.label(method) in table for method in draw.METHODS)


def test_committed_results_are_of_every_condition_and_five_seeds() -> None:
    study, results = load("study"), json.loads((MINIATURE / "results.json").read_text())
    assert results["seeds"] == [1, 2, 3, 4, 5]
    expected = Counter(
        (cell.start, cell.answered, cell.scored, cell.seed, each.method, each.k, each.schedule)
        for group in study.cells(results["seeds"])
        for cell in group
        for each in cell.conditions(short=False)
    )
    names = ("start", "answered_by", "scored_by", "seed", "method", "k", "schedule")
    assert Counter(tuple(run[name] for name in names) for run in results["conditions"]) == expected
    assert set(expected.values()) == {1}


def test_pages_hold_the_numbers_of_the_committed_results() -> None:
    draw = load("draw")
    texts = ((MINIATURE / "README.md").read_text(), (ROOT / "docs" / "objectives.md").read_text())
    study = draw.Study(json.loads((MINIATURE / "results.json").read_text()))
    assert draw.pages(study, *texts) == texts, "run examples/miniature/draw.py"
