"""The agreement gate: two engines score the same rollouts before the first score is kept."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_lopd.config import AgreementConfig, EngineConfig, ScoreConfig, deciding, to_plain
from megatron_lopd.convert.hf_checkpoint import check_weights
from megatron_lopd.data.dataset import open_shards
from megatron_lopd.data.records import Rollout, Score
from megatron_lopd.data.schemas import ROLLOUTS
from megatron_lopd.engines import open_engine
from megatron_lopd.errors import NumericsError
from megatron_lopd.families.architecture import check_layout, read_architecture
from megatron_lopd.files.digests import canonical_json, sha256_bytes
from megatron_lopd.files.reading import read_object
from megatron_lopd.files.writing import atomic_write_json
from megatron_lopd.mcore.precision import check_precision
from megatron_lopd.runtime.claims import make_once
from megatron_lopd.runtime.display import say
from megatron_lopd.training.preflight import TOLERANCES, Spread

AGREEMENT_FILE = "agreement.json"
CAUSES = (
    "likely causes are a precision far from the other's (dtype, fp8: raise the tolerances of score.agreement "
    "if that is all), RoPE scaling that one of them does not know, another checkpoint or template, "
    "or log-probs shifted by one token"
)
# An unlikely token's logit is rounded as much as a likely one's, whose log-prob cannot leave 0 by much: in
# bf16 against fp32, SmolLM2-135M's top 64 differ 1.6 (its own samples) to 2.3 times (plain text) as much.
TOP_K_SCALE = 2.0
# Of the mean's tolerance. Those same differences had a 99th percentile of 5 to 6 means, and among 20,000
# top-k tokens a largest one of 28: the tail is long, and a gate sees 100 times as many.
P99_SCALE, MAX_SCALE = 10.0, 100.0


def check_engine(engine: EngineConfig, model_dir: Path) -> None:
    """Raise ConfigError unless the model can be split and its numbers computed as `engine` says, here.

    And DataError where an engine of ranks, which is the trainer's, could not read its weights.
    """
    layout = engine.options.layout
    if layout is not None:
        arch = read_architecture(model_dir)
        check_layout(arch, layout)
        check_precision(arch, layout, engine.fp8)
        check_weights(model_dir, arch)


def check_agreement(
    scoring: ScoreConfig,
    agreement: AgreementConfig,
    teacher: Path,
    rollout_dir: Path,
    directory: Path,
    made_from: str,
) -> None:
    """Score some rollouts with both engines, in one worker, and keep how they compare in `directory`.

    Nothing is done where that file is already there of the same engines, tolerances and inputs, of which
    `made_from` is a digest. Raises NumericsError, naming the likely causes, when they disagree.
    """
    path = directory / AGREEMENT_FILE
    engines = [deciding(engine) for engine in (scoring.engine, agreement.engine)]
    identity = sha256_bytes(canonical_json([made_from, engines, to_plain(agreement)]))
    if path.is_file() and read_object(path, follow_links=False).get("identity") != identity:
        path.unlink(missing_ok=True)  # of other tolerances, before this run of the stage
    head = {"identity": identity, "engines": engines}

    def make() -> None:
        atomic_write_json(path, head | _agreement(scoring, agreement, teacher, rollout_dir))

    make_once(path, make)


def _agreement(
    scoring: ScoreConfig, agreement: AgreementConfig, teacher: Path, rollout_dir: Path
) -> dict[str, Any]:
    """How many samples both scored, the tolerances, and a Comparison. Raises NumericsError."""
    reader = open_shards(ROLLOUTS, rollout_dir)
    count = min(agreement.samples, len(reader))
    rollouts = [reader.record(int(at)) for at in np.linspace(0, len(reader) - 1, count)]
    # One after the other: two teachers may not fit the memory.
    first, second = (
        _scored(engine, teacher, rollouts, scoring.top_k) for engine in (scoring.engine, agreement.engine)
    )
    tolerance = _tolerances(scoring.engine, agreement)
    found = compare(first, second)
    names = f"{_described(scoring.engine)} and {_described(agreement.engine)}"
    _refuse(found, tolerance, f"{names} disagree on {count} rollouts")
    say(
        f"lopd: score: {names} agree on {count} rollouts within {found.own.mean:.2g} nats on average (99% of "
        f"tokens within {found.own.p99:.2g}, the largest {found.own.max:.2g})"
    )
    return {"samples": count, "tolerance": asdict(tolerance), **asdict(found)}


@dataclass(frozen=True)
class Comparison:
    """|Differences| of two engines' scores: `own` of the response tokens, `top_k` of the ids that both have
    among the likeliest, which are `shared` of all (None without a top k)."""

    tokens: int
    own: Spread
    top_k: Spread | None
    shared: float | None


def compare(first: Sequence[Score], second: Sequence[Score]) -> Comparison:
    """Scores of the same rollouts, in order."""
    own = np.concatenate([a.log_probs - b.log_probs for a, b in zip(first, second, strict=True)])
    spread = Spread.of(torch.from_numpy(own))
    if first[0].top_k is None:
        return Comparison(len(own), spread, None, None)
    shared = np.concatenate([_at_shared_ids(a, b) for a, b in zip(first, second, strict=True)])
    kept = sum(score.top_k.ids.size for score in first if score.top_k)
    top_k = Spread.of(torch.from_numpy(shared)) if len(shared) else Spread(np.inf, np.inf, np.inf)
    return Comparison(len(own), spread, top_k, len(shared) / kept)


def _at_shared_ids(first: Score, second: Score) -> NDArray[np.float32]:
    """The differences of top-k log-probs at the ids that both have in one place: [shared]."""
    assert first.top_k is not None
    assert second.top_k is not None
    row = np.arange(len(first.log_probs), dtype=np.int64)[:, None] << 32
    _, at, other = np.intersect1d(
        row + first.top_k.ids, row + second.top_k.ids, assume_unique=True, return_indices=True
    )
    return first.top_k.log_probs.ravel()[at] - second.top_k.log_probs.ravel()[other]


def _scored(engine: EngineConfig, teacher: Path, rollouts: Sequence[Rollout], top_k: int) -> list[Score]:
    with closing(open_engine(engine, str(teacher))) as opened:
        return list(opened.score(rollouts, top_k))


def _tolerances(engine: EngineConfig, agreement: AgreementConfig) -> Spread:
    """The recipe's, or those of the coarsest numbers among the two engines'."""
    both = (engine, agreement.engine)
    coarsest = max(TOLERANCES[name] for each in both for name in (each.dtype, *(["fp8"] if each.fp8 else [])))
    mean = agreement.mean or coarsest
    return Spread(mean, agreement.p99 or P99_SCALE * mean, agreement.max or MAX_SCALE * mean)


def _refuse(found: Comparison, tolerance: Spread, what: str) -> None:
    """Raise NumericsError for the first thing above its tolerance; NaN is above any."""
    for tokens, spread, scale in (
        ("response tokens", found.own, 1.0),
        ("shared top-k tokens", found.top_k, TOP_K_SCALE),
    ):
        if spread is None:
            continue
        for name, limit in ((each, scale * limit) for each, limit in asdict(tolerance).items()):
            if not getattr(spread, name) <= limit:
                raise NumericsError(
                    f"refused: {what}: their log-probs of {tokens} differ by {spread.mean:.4g} nats on "
                    f"average, {spread.p99:.4g} at the 99th percentile and {spread.max:.4g} at most; {name} "
                    f"is above its tolerance of {limit:g}: {CAUSES}"
                )


def _described(engine: EngineConfig) -> str:
    return f"{engine.name} ({engine.dtype}{', fp8 ' + engine.fp8.recipe if engine.fp8 else ''})"
