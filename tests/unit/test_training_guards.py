"""The drift guard on numbers, and in the loop: it stops a run that leaves its rollouts, and no other."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from gloo import RankError, run_ranks

from megatron_lopd.config import GuardConfig, OptimizerConfig, TrainConfig, load_recipe
from megatron_lopd.errors import ConfigError, DriftError
from megatron_lopd.training.guards import check_drift, checkpoints_kept, recent_drift
from tests.training_zoo import make_root, train

STEADY = {"kept_mass": 0.99, "effective_sample_size": 0.8, "drift_kl": 0.05}
AWAY = {"kept_mass": 0.7, "effective_sample_size": 0.1, "drift_kl": 2.0}
LIMITS = {"min_kept_mass": 0.9, "min_effective_sample_size": 0.5, "max_drift_kl": 1.0}
METRIC_OF = {
    "min_kept_mass": "kept_mass",
    "min_effective_sample_size": "effective_sample_size",
    "max_drift_kl": "drift_kl",
}


def judge(steps: list[dict[str, float]], guard: GuardConfig) -> int | None:
    """The step, from 1, at which `guard` stops a run of these metrics; None when it does not."""
    recent: list[dict[str, float]] = []
    for step, measured in enumerate(steps, start=1):
        recent = recent_drift(recent, measured | {"loss": math.nan}, guard.window)
        assert len(recent) <= guard.window
        try:
            check_drift(recent, guard, step, Path("last"))
        except DriftError:
            return step
    return None


@pytest.mark.parametrize("limit", LIMITS)
def test_most_of_a_window_must_be_past_a_limit(limit: str) -> None:
    only = dict.fromkeys(LIMITS) | {limit: LIMITS[limit]}
    guard = GuardConfig(**only, window=5)
    metric = METRIC_OF[limit]
    away = STEADY | {metric: AWAY[metric]}
    assert judge([STEADY] * 20 + [away, away] + [STEADY] * 20, guard) is None  # two outliers
    assert judge([STEADY] * 20 + [away] * 20, guard) == 23  # the third makes three of five
    assert judge([away] * 20, guard) == 5  # not before there is a window
    others = STEADY | {name: AWAY[name] for name in AWAY if name != metric}
    assert judge([others] * 20, guard) is None  # limits that are not set


def test_message_names_metric_limit_checkpoint_and_remedies() -> None:
    with pytest.raises(DriftError, match=r"step 7: .*kept_mass is 0\.7 over 2 steps") as caught:
        check_drift([AWAY, AWAY], GuardConfig(window=2), 7, Path("run/step_00000005"))
    assert caught.value.exit_code == 3
    assert caught.value.last_good == Path("run/step_00000005")
    for part in (
        "train.guard.min_kept_mass=0.93",
        "run/step_00000005",
        "train.refresh_every",
        "topk_reverse_kl",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("min_kept_mass", 1.0),
        ("min_kept_mass", 0.0),
        ("min_effective_sample_size", 1.5),
        ("max_drift_kl", 0.0),
        ("window", 0),
    ],
)
def test_limits_out_of_range_are_refused(tmp_path: Path, key: str, value: float) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"run_dir: runs/x\ntrain: {{steps: 1, guard: {{{key}: {value}}}}}\n")
    with pytest.raises(ConfigError, match=rf"train\.guard\.{key} must be "):
        load_recipe(recipe)


@pytest.mark.parametrize(("every", "kept"), [(50, 2), (10, 2), (5, 3), (1, 11)])
def test_a_checkpoint_from_before_the_window_is_kept(every: int, kept: int) -> None:
    config = TrainConfig(steps=99, checkpoint_every=every, guard=GuardConfig(window=10))
    assert checkpoints_kept(config, config.guard) == kept
    for step in range(11, 99):  # the guard stops the run before a checkpoint of this step is saved
        saved = list(range(0, step, every))[-kept:]
        assert any(each <= step - 10 for each in saved)
    assert checkpoints_kept(config, GuardConfig(min_kept_mass=None)) == 2
    assert checkpoints_kept(config, None) == 2


def _train(root: Path, lr: float, options: dict[str, Any]) -> Any:
    return train(root, optimizer=OptimizerConfig(lr=lr), steps=12, checkpoint_every=2, **options)


@pytest.mark.slow
def test_a_run_that_pushes_its_rollouts_away_is_stopped_and_goes_on_when_told(tmp_path: Path) -> None:
    """fixed_negative makes every sampled token less likely, until the cache covers nothing."""
    root = make_root(tmp_path)
    options = {"objective": "fixed_negative", "guard": GuardConfig(window=3, min_kept_mass=0.6)}
    with pytest.raises(RankError, match=r"DriftError: step \d+: .*kept_mass") as caught:
        run_ranks(1, _train, root, 1e-3, options)
    stopped_at = int(re.findall(r"step (\d+):", str(caught.value))[0])
    good = (stopped_at - 3) // 2 * 2  # a checkpoint every second step, and none of the window's is good
    assert f"step_{good:08d}" in str(caught.value)
    assert (root / "run" / "checkpoints" / f"step_{good:08d}" / "manifest.json").is_file()
    with pytest.raises(RankError, match="DriftError"):  # resumed, it has not forgotten
        run_ranks(1, _train, root, 1e-3, options)
    # The limits are no part of what decides the numbers: the same job goes on past them.
    options["guard"] = GuardConfig(min_kept_mass=None)
    ((progress, steps, _),) = run_ranks(1, _train, root, 1e-3, options)
    assert progress.step == len(steps) == 12
    assert steps[-1]["kept_mass"] < 0.6


def test_a_run_that_stays_near_its_rollouts_is_left_alone(tmp_path: Path) -> None:
    ((progress, steps, _),) = run_ranks(1, _train, make_root(tmp_path), 1e-4, {})
    assert progress.step == 12
    assert min(step["kept_mass"] for step in steps) > 0.93
