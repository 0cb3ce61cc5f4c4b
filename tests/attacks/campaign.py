"""Attempts drawn by hypothesis, a seed after another, counted by kind."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.attacks.attack import Attack
from tests.attacks.trial import WRONG, Outcome, attempt

SHRINK_SECONDS = 30.0  # that a finding may take to be made smaller


@dataclass(frozen=True)
class Finding:
    """An attempt that came out wrong, as small as it was made."""

    kind: str
    seed: int
    change: str
    outcome: Outcome

    def __str__(self) -> str:
        return (
            f"{self.kind}: {self.outcome.verdict}: {self.change[:1000]}: {self.outcome.detail} "
            f"(again: python -m tests.attacks --kind {self.kind} --seed {self.seed})"
        )


@dataclass
class Tally:
    """What came of a kind's attempts: `tried` by verdict, without those that made a finding smaller."""

    tried: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    findings: list[Finding] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Count those of `other` too."""
        self.tried.update(other.tried)
        self.peak = max(self.peak, other.peak)
        self.findings += other.findings


class Campaign:
    """The attempts of one kind on worlds like the finished one."""

    def __init__(self, attack: Attack[Any], finished: Path, place: Path) -> None:
        self._attack = attack
        self._valid = place / attack.name
        self._valid.mkdir(parents=True)
        for name in attack.copies:
            source, target = finished / name, self._valid / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, target)
        attack.build(self._valid)
        self._unspoilt = attempt(attack, self._valid, None, None)

    def run(self, seed: int, examples: int, until: float | None = None) -> Tally:
        """`examples` attempts of that seed; none begins after `until` (`time.monotonic`)."""
        if self._unspoilt.verdict != "accepted":
            finding = Finding(self._attack.name, seed, "nothing changed", self._unspoilt)
            return Tally(Counter({self._unspoilt.verdict: 1}), self._unspoilt.peak, [finding])
        tally, worst = Tally(), list[tuple[Any, Outcome]]()
        shrinking_since: float | None = None

        @hypothesis.seed(seed)
        @settings(
            max_examples=examples,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            verbosity=hypothesis.Verbosity.quiet,
        )
        @given(self._attack.changes())
        def attack(change: Any) -> None:
            nonlocal shrinking_since
            now = time.monotonic()
            if until is not None and now > until:
                return
            if shrinking_since is not None and now - shrinking_since > SHRINK_SECONDS:
                return
            outcome = attempt(self._attack, self._valid, change, self._unspoilt.evidence)
            tally.peak = max(tally.peak, outcome.peak)
            if shrinking_since is None:
                tally.tried[outcome.verdict] += 1
            if outcome.verdict in WRONG:
                if shrinking_since is None or outcome.verdict == worst[0][1].verdict:
                    worst.append((change, outcome))
                shrinking_since = shrinking_since or now
                raise AssertionError(outcome.verdict)

        _quietly(attack)
        if worst:
            change, outcome = min(worst, key=lambda each: len(repr(each[0])))
            tally.findings.append(Finding(self._attack.name, seed, repr(change), outcome))
        return tally


def _quietly(attack: Callable[[], None]) -> None:
    """What hypothesis raises says no more than the findings do."""
    with suppress(AssertionError, hypothesis.errors.Flaky, hypothesis.errors.FlakyFailure):
        attack()
