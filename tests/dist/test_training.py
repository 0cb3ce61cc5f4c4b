from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import RankError, run_ranks

from megatron_lopd.config import OptimizerConfig, ParallelConfig
from megatron_lopd.convert.torch_dist import TorchDistReader
from tests.training_zoo import make_root, train

LAYOUTS = {
    "tp2": ParallelConfig(tensor=2, sequence=True, processes=2),
    "pp2": ParallelConfig(pipeline=2, processes=2),
    "dp2": ParallelConfig(processes=2),
    "cp2": ParallelConfig(context=2, processes=2),
    "pp2, interleaved": ParallelConfig(pipeline=2, virtual_pipeline=2, processes=2),
}
RESUMED_AT = {
    "tp2": ("tp2", "pp2"),
    "pp2": ("pp2", "pp2, interleaved"),
    "dp2": ("dp2", "alone"),
    "cp2": ("cp2", "dp2"),
    "pp2, interleaved": ("pp2, interleaved", "cp2"),
}
# A layout sums in another order: 4e-7 relative seen in losses and norms of six fp32 steps (asked: 1e-4),
ROUNDED = 1e-5
# and in single tokens' log-probs, of size 10, a few 1e-6 nats: these are what quantiles pick.
NATS = 2e-5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("job"), layers=4)


@pytest.fixture(scope="module")
def alone(root: Path) -> list[dict[str, Any]]:
    ((_, steps, _),) = run_ranks(1, _train, root, {"work": "alone"})
    return steps


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_agree_with_one_and_resume_at_any_layout(
    root: Path, alone: list[dict[str, Any]], layout: str
) -> None:
    results = run_ranks(2, _train, root, {"work": layout, "parallel": LAYOUTS[layout]})
    for _, steps, _ in results:
        assert_agree(steps, alone)
    # Weights may still be on their way to all ranks when a checkpoint is written.
    saved, expected = (read_weights(root / work / "checkpoints" / "step_00000004") for work in (layout, "alone"))
    for name, weight in expected.items():
        # Without the rows that pad the vocabulary. A step moves a weight by up to 1e-3; four agree to 1e-6.
        torch.testing.assert_close(saved[name][: len(weight)], weight, rtol=0, atol=2e-5)

    for other in RESUMED_AT[layout]:
        parallel = LAYOUTS.get(other, ParallelConfig())
        work = root / f"{layout}-resumed-{other}"
        shutil.copytree(root / layout, work)
        shutil.rmtree(work / "checkpoints" / "step_00000006")
        options = {"work": work.name, "parallel": parallel}
        assert_agree(run_ranks(parallel.processes, _train, root, options)[0][1], alone)


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = TorchDistReader(checkpoint)
    return {name: reader.read(name, ()) for name in reader.tensors if not name.startswith("optimizer.")}


def assert_agree(steps: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(steps) == len(expected)
    for step, reference in zip(steps, expected, strict=True):
        # The fill differs with the number of micro-batches, which is a multiple of the data-parallel size.
        for name in reference.keys() - {"packing_fill"}:
            slack = {"rel": ROUNDED} if name in ("loss", "grad_norm") else {"rel": ROUNDED, "abs": NATS}
            assert step[name] == pytest.approx(reference[name], **slack), (name, step["step"])


def test_a_gradient_that_is_not_finite_is_skipped_by_all_ranks_together(root: Path) -> None:
    """Only rank 1's second batch is poisoned."""
    options = {"parallel": LAYOUTS["dp2"], "optimizer": OptimizerConfig(lr=1e-3)}
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
    options = {"work": "stopped", "parallel": LAYOUTS["dp2"], "checkpoint_every": 100}
    assert run_ranks(2, _stopped, root, options) == ["StopRequested"] * 2
    assert [path.name for path in (root / "stopped" / "checkpoints").iterdir()] == ["step_00000003"]
    assert_agree(run_ranks(2, _train, root, options)[0][1], alone)


def _train(root: Path, options: dict[str, Any]) -> Any:
    return train(root, **options)


def _poisoned(root: Path, options: dict[str, Any]) -> Any:
    from megatron_lopd import objectives

    done = _count_steps()

    class Poisoned(objectives.SampledReverseKl):
        def token_loss(self, tokens: objectives.TokenLogProbs) -> torch.Tensor:
            loss = super().token_loss(tokens)
            return loss * float("nan") if os.environ["RANK"] == "1" and len(done) == 1 else loss

    objectives.OBJECTIVES["poisoned"] = Poisoned()  # type: ignore[index]
    return train(root, **options)


def _stopped(root: Path, options: dict[str, Any]) -> str:
    from megatron_lopd import objectives
    from megatron_lopd.errors import StopRequested

    done = _count_steps()

    class Stopping(objectives.SampledReverseKl):
        def token_loss(self, tokens: objectives.TokenLogProbs) -> torch.Tensor:
            if os.environ["RANK"] == "1" and len(done) == 2:
                os.kill(os.getpid(), signal.SIGUSR1)
            return super().token_loss(tokens)

    objectives.OBJECTIVES["sampled_reverse_kl"] = Stopping()  # type: ignore[index]
    try:
        train(root, **options)
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
