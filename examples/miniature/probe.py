"""Can scores alone tell whether this teacher is the one that a student was fine-tuned on?

    python examples/miniature/probe.py       # after study.py: reads its students' rollouts, a minute

Every SFT student of the study is scored by both teachers, and four statistics of the scores are tried. Each
is meant to be small when the teacher is the one of the student's SFT data. `marginal gap` uses what maximum
likelihood does to a student even where it is unsure: over all states together it writes each token as often
as its teacher would. For each statistic: its values, how often a random inconsistent case exceeds a random
consistent one (AUC), and the errors of a threshold chosen on the other seeds (leave one seed out).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_lopd.config import EngineConfig
from megatron_lopd.data.dataset import open_shards
from megatron_lopd.data.records import Rollout, Score
from megatron_lopd.data.schemas import ROLLOUTS
from megatron_lopd.engines import open_engine

HERE = Path(__file__).parent
TEACHERS = ("equals", "terse")
SAMPLES = 1024
TOP_K = 8
VOCABULARY = 21


@dataclass(frozen=True)
class Case:
    """A student, a teacher that scored it, and what the scores say."""

    student: str
    teacher: str
    seed: int
    consistent: bool
    values: dict[str, float]


def cases(run_dir: Path) -> list[Case]:
    engines = {
        name: open_engine(EngineConfig(batch_size=256), str(HERE / f"teacher_{name}")) for name in TEACHERS
    }
    found = []
    for directory in sorted(run_dir.glob("*-*-*/rollout")):
        start, answered, seed = directory.parent.name.split("-")
        reader = open_shards(ROLLOUTS, directory)
        rollouts = [reader.record(index) for index in range(min(SAMPLES, len(reader)))]
        for name, engine in engines.items():
            values = measure(rollouts, list(engine.score(rollouts, TOP_K)))
            found.append(Case(f"{start}, {answered}", name, int(seed), name == answered, values))
    return found


def measure(rollouts: list[Rollout], scores: list[Score]) -> dict[str, float]:
    """The statistics, nats a token but for the gap, which is a total variation in [0, 1]."""
    reference = np.concatenate([r.log_probs for r in rollouts if r.log_probs is not None]).astype(np.float64)
    teacher = np.concatenate([score.log_probs for score in scores]).astype(np.float64)
    reverse_kl, entropy = float((reference - teacher).mean()), float(-reference.mean())
    return {
        "reverse KL": reverse_kl,
        "reverse KL / entropy": reverse_kl / entropy,
        "share of tokens below 0.1": float((teacher < np.log(0.1)).mean()),
        "marginal gap": marginal_gap(rollouts, scores),
    }


def marginal_gap(rollouts: list[Rollout], scores: list[Score]) -> float:
    """Total variation between how often tokens were written and how often the teacher would, on average."""
    written, expected = np.zeros(VOCABULARY), np.zeros(VOCABULARY)
    for rollout, score in zip(rollouts, scores, strict=True):
        assert score.top_k is not None
        tokens: NDArray[Any] = rollout.response_tokens
        np.add.at(written, tokens, 1.0)
        np.add.at(expected, score.top_k.ids, np.exp(score.top_k.log_probs.astype(np.float64)))
        outside = ~(score.top_k.ids == tokens[:, None]).any(axis=1)
        np.add.at(expected, tokens[outside], np.exp(score.log_probs[outside].astype(np.float64)))
    return float(np.abs(written - expected).sum() / (2 * written.sum()))


def auc(consistent: list[float], inconsistent: list[float]) -> float:
    pairs = [(a, b) for a in consistent for b in inconsistent]
    return sum((b > a) + 0.5 * (b == a) for a, b in pairs) / len(pairs)


def threshold(values: list[tuple[float, bool]]) -> float:
    """The midpoint with the fewest errors, of those the one in the widest gap."""
    ordered = sorted(value for value, _ in values)
    gaps = [((a + b) / 2, b - a) for a, b in itertools.pairwise(ordered)]

    def errors(limit: float) -> int:
        return sum((value > limit) == consistent for value, consistent in values)

    return min(gaps, key=lambda gap: (errors(gap[0]), -gap[1]))[0]


def judge(found: list[Case], name: str) -> dict[str, Any]:
    by_kind: dict[bool, list[float]] = {
        kind: [case.values[name] for case in found if case.consistent == kind] for kind in (True, False)
    }
    false_alarms, misses = 0, 0
    for seed in {case.seed for case in found}:
        rest = [(case.values[name], case.consistent) for case in found if case.seed != seed]
        limit = threshold(rest)
        for case in (case for case in found if case.seed == seed):
            false_alarms += case.consistent and case.values[name] > limit
            misses += not case.consistent and case.values[name] <= limit
    return {
        "auc": round(auc(by_kind[True], by_kind[False]), 3),
        "false_alarms": f"{false_alarms} of {len(by_kind[True])}",
        "misses": f"{misses} of {len(by_kind[False])}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Try to tell teachers apart from their scores.")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/miniature"), help="where the study ran")
    found = cases(parser.parse_args().run_dir)
    kinds = sorted({(case.student, case.teacher) for case in found})
    for name in found[0].values:
        print(f"{name}: {json.dumps(judge(found, name))}")
        for student, teacher in kinds:
            values = [c.values[name] for c in found if (c.student, c.teacher) == (student, teacher)]
            spread = f"{min(values):.4f} to {max(values):.4f}"
            print(f"  {student} scored by {teacher}: {statistics.fmean(values):.4f} ({spread})")


if __name__ == "__main__":
    main()
