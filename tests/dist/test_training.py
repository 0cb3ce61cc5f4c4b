from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import RankError, run_ranks

from megatron_lopd.config import OptimizerConfig, ParallelConfig
from tests.training_zoo import assert_agree, make_root, train

DP2 = ParallelConfig(processes=2)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def alone(root: Path) -> list[dict[str, Any]]:
    ((_, steps, _),) = run_ranks(1, _train, root, {"work": "alone"})
    return steps


def test_a_gradient_that_is_not_finite_is_skipped_by_all_ranks_together(root: Path) -> None:
    """Only rank 1's second batch is poisoned."""
    options = {"parallel": DP2, "optimizer": OptimizerConfig(lr=1e-3)}
    poisoned = options | {"objective": "poisoned", "max_skipped_steps": 1}
    ((_, _, before), _) = run_ranks(2, _train, root, {"work": "clean", "steps": 1, **options})
    results = run_ranks(2, _poisoned, root, {"work": "skipped", "steps": 2, **poisoned})
    assert [weights for _, _, weights in results] == [before, before], "the second step left no trace"

    ((progress, steps, _), _) = run_ranks(2, _poisoned, root, {"work": "goes-on", "steps": 3, **poisoned})
    assert [step["skipped"] for step in steps] == [0, 1, 0]
    assert progress.skipped_steps == 1
    assert steps[1]["loss"] is None
    assert steps[1]["grad_norm"] is None

    with pytest.raises(RankError, match=r"NumericsError: step 2: .* max_skipped_steps=0"):
        run_ranks(2, _poisoned, root, {"work": "refused", "steps": 3, **poisoned, "max_skipped_steps": 0})


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(root: Path, alone: list[dict[str, Any]]) -> None:
    options = {"work": "stopped", "parallel": DP2, "checkpoint_every": 100}
    assert run_ranks(2, _stopped, root, options) == ["StopRequested"] * 2
    assert [path.name for path in (root / "stopped" / "checkpoints").iterdir()] == ["step_00000003"]
    assert_agree(run_ranks(2, _train, root, options)[0][1], alone)


def _train(root: Path, options: dict[str, Any]) -> Any:
    return train(root, **options)


def _poisoned(root: Path, options: dict[str, Any]) -> Any:
    from megatron_lopd import objectives
    from megatron_lopd.registry import OBJECTIVES

    done = _count_steps()

    class Poisoned(objectives.SampledReverseKl):
        name = "poisoned"

        def token_loss(self, tokens: objectives.TokenLogProbs) -> torch.Tensor:
            loss = super().token_loss(tokens)
            return loss * float("nan") if os.environ["RANK"] == "1" and len(done) == 1 else loss

    OBJECTIVES.add(Poisoned)
    return train(root, **options)


def _stopped(root: Path, options: dict[str, Any]) -> str:
    from megatron_lopd import objectives
    from megatron_lopd.errors import StopRequested
    from megatron_lopd.registry import OBJECTIVES

    done = _count_steps()

    class Stopping(objectives.SampledReverseKl):
        name = "stopping"

        def token_loss(self, tokens: objectives.TokenLogProbs) -> torch.Tensor:
            if os.environ["RANK"] == "1" and len(done) == 2:
                os.kill(os.getpid(), signal.SIGUSR1)
            return super().token_loss(tokens)

    OBJECTIVES.add(Stopping)
    try:
        train(root, **options | {"objective": "stopping"})
    except StopRequested as stop:
        return type(stop).__name__
    return "finished"


def _count_steps() -> list[bool]:
    """A list that grows by one with every optimizer step of this process."""
    from megatron_lopd.training import loop

    done: list[bool] = []
    step = loop.guarded_step

    def counted(optimization: Any) -> tuple[float, bool]:
        norm, applied = step(optimization)
        done.append(applied)
        return norm, applied

    loop.guarded_step = counted
    return done
