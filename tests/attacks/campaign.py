"""Attempts drawn by hypothesis, a seed after another, counted by kind."""

from __future__ import annotations

import re
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
from hypothesis.strategies import SearchStrategy

from tests.attacks.attack import Attack
from tests.attacks.trial import WRONG, Outcome, attempt

Signature = tuple[str, str, str]
SHRINK_SECONDS = 30.0  # that a finding may take to be made smaller

COLUMNS = ("tried", "refused", "accepted", "undetected", "uncaught", "hangs", "outside", "memory", "peak MB")


@dataclass(frozen=True)
class Finding:
    """An attempt that came out wrong, as small as it was made."""

    kind: str
    seed: int
    change: str
    outcome: Outcome

    def __str__(self) -> str:
        change = self.change if len(self.change) < 600 else f"{self.change[:500]}... ({len(self.change):,})"
        again = f"python -m tests.attacks --kind '{self.kind}' --seed {self.seed}"
        return f"{self.kind}: {self.outcome.verdict}: {change}: {self.outcome.detail} (again: {again})"


@dataclass
class Tally:
    """What came of a kind's attempts: `tried` by verdict, and what was found wrong, one of each kind."""

    tried: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    findings: list[Finding] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Count those of `other` too."""
        self.tried.update(other.tried)
        self.peak = max(self.peak, other.peak)
        self.findings += other.findings


def table(tallies: dict[str, Tally]) -> list[str]:
    """The counts by kind, a line each; those that time was too short for; the counts of all together."""
    whole = Tally()
    for tally in tallies.values():
        whole.add(tally)
    rows = [("kind", *COLUMNS)]
    tried = [(name, tallies[name]) for name in sorted(tallies) if tallies[name].tried.total()]
    for name, tally in [*tried, ("all", whole)]:
        verdicts = ("refused", "accepted", "undetected", "uncaught", "hang", "outside", "memory")
        counts = (tally.tried.total(), *(tally.tried[each] for each in verdicts), round(tally.peak / 1e6))
        rows.append((name, *(f"{count:,}" for count in counts)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    *lines, together = [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    if missed := sorted(tallies.keys() - dict(tried).keys()):
        lines.append(f"not tried at all, for want of time: {', '.join(missed)}")
    return [*lines, together]


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
        self._told: set[Signature] = set()
        self._unspoilt = attempt(attack, self._valid, None, None)

    def run(self, seed: int, examples: int, until: float | None = None) -> Tally:
        """`examples` attempts of that seed; none begins after `until` (`time.monotonic`).

        Findings of one kind are told once, however often they are met.
        """
        if self._unspoilt.verdict != "accepted":
            finding = Finding(self._attack.name, seed, "nothing changed", self._unspoilt)
            return Tally(Counter({self._unspoilt.verdict: 1}), self._unspoilt.peak, [finding])
        tally, new = Tally(), dict[Signature, tuple[Any, Outcome]]()
        outcomes: dict[str, Outcome] = {}

        def attack(change: Any) -> None:
            if until is not None and time.monotonic() > until:
                return
            outcome = outcomes[repr(change)] = self._attempt(change)
            tally.tried[outcome.verdict] += 1
            tally.peak = max(tally.peak, outcome.peak)
            if outcome.verdict in WRONG and (signature := _signature(change, outcome)) not in self._told:
                new.setdefault(signature, (change, outcome))

        _draw(attack, self._attack.changes(), seed, examples)
        for signature, found in new.items():
            self._told.add(signature)
            change, outcome = self._smaller(signature, found, seed, examples, outcomes)
            tally.findings.append(Finding(self._attack.name, seed, repr(change), outcome))
        return tally

    def _attempt(self, change: Any) -> Outcome:
        return attempt(self._attack, self._valid, change, self._unspoilt.evidence)

    def _smaller(
        self,
        signature: Signature,
        found: tuple[Any, Outcome],
        seed: int,
        examples: int,
        outcomes: dict[str, Outcome],
    ) -> tuple[Any, Outcome]:
        """A simpler change with the outcome that was `found`, if there is time for one."""
        until = time.monotonic() + SHRINK_SECONDS
        simplest = found

        def attack(change: Any) -> None:
            nonlocal simplest
            key = repr(change)
            if key not in outcomes:
                if time.monotonic() > until:
                    return
                outcomes[key] = self._attempt(change)
            outcome = outcomes[key]
            if outcome.verdict in WRONG and _signature(change, outcome) == signature:
                if len(key) < len(repr(simplest[0])):
                    simplest = change, outcome
                raise AssertionError(outcome.verdict)

        _draw(attack, self._attack.changes(), seed, examples)
        return simplest


def _signature(change: Any, outcome: Outcome) -> Signature:
    """What two outcomes have in common that are one fault, as far as can be told."""
    text = re.sub(r"b?'[^']*'|\"[^\"]*\"|[0-9a-f]{6,}|\d+", "", outcome.detail)
    return type(change).__name__, outcome.verdict, text[:160]


def _draw(attack: Callable[[Any], None], changes: SearchStrategy[Any], seed: int, examples: int) -> None:
    """Call `attack` with so many changes, the same for a seed; with simpler ones after one that fails."""
    drawn = settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        verbosity=hypothesis.Verbosity.quiet,
    )
    # What hypothesis raises says no more than the findings do.
    with suppress(AssertionError, hypothesis.errors.Flaky, hypothesis.errors.FlakyFailure):
        hypothesis.seed(seed)(drawn(given(changes)(attack)))()
