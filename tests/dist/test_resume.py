"""Save at one layout, go on at another: the same samples in the same order, and the same losses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import RankError, run_ranks

from megatron_lopd.config import ParallelConfig
from megatron_lopd.checkpoint.torch_dist import TorchDistReader
from tests.model_zoo import make_model_dir
from tests.training_zoo import VOCABULARY, assert_agree, make_root, train

LAYOUTS = {
    "tp2": ParallelConfig(tensor=2, sequence=True, processes=2),
    "pp2": ParallelConfig(pipeline=2, processes=2),
    "dp2": ParallelConfig(processes=2),
    "cp2": ParallelConfig(context=2, processes=2),
    "pp2, interleaved": ParallelConfig(pipeline=2, virtual_pipeline=2, processes=2),
    "alone": ParallelConfig(),
}
RESUMED_AT = {
    "tp2": ("tp2", "pp2", "dp2", "alone"),
    "pp2": ("pp2, interleaved",),
    "dp2": ("dp2", "cp2"),
    "cp2": ("cp2", "tp2"),
    "pp2, interleaved": ("pp2, interleaved", "alone"),
}
SAVED, STEPS = 4, 6  # 16 of 40 samples a step: both sides of the cut straddle an epoch


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("job"), layers=4)


@pytest.fixture(scope="module")
def alone(root: Path) -> Any:
    ((result, asked),) = run_ranks(1, _train, root, {"work": "alone"})
    assert sorted(asked) == list(range(STEPS))
    return result[1], asked


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("tp2", marks=pytest.mark.release),
        "dp2",
        "pp2, interleaved",
        *(pytest.param(layout, marks=pytest.mark.nightly) for layout in ("pp2", "cp2")),
    ],
)
def test_two_processes_agree_with_one_and_resume_at_any_layout(root: Path, alone: Any, layout: str) -> None:
    expected, order = alone
    results = run_ranks(2, _train, root, {"work": layout, "parallel": LAYOUTS[layout]})
    for (_, steps, _), asked in results:
        assert_agree(steps, expected)
        assert asked == order
    # Weights may still be on their way to all ranks when a checkpoint is staged.
    saved, whole = (read_weights(root / work / "checkpoints" / f"step_{SAVED:08d}") for work in (layout, "alone"))
    for name, weight in whole.items():
        # Without the rows that pad the vocabulary. A step moves a weight by up to 1e-3; four agree to 1e-6.
        torch.testing.assert_close(saved[name][: len(weight)], weight, rtol=0, atol=2e-5)

    for other in RESUMED_AT[layout]:
        parallel = LAYOUTS[other]
        work = root / f"{layout}-resumed-{other}"
        shutil.copytree(root / layout, work)
        shutil.rmtree(work / "checkpoints" / f"step_{STEPS:08d}")
        resumed = run_ranks(parallel.processes, _train, root, {"work": work.name, "parallel": parallel})
        for (_, steps, weights), asked in resumed:
            assert_agree(steps, expected)
            assert asked == {step: order[step] for step in range(SAVED, STEPS)}, "none again, none left out"
            if other == layout:
                assert (steps, weights) == results[0][0][1:], "to the last bit"


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = TorchDistReader(checkpoint)
    return {name: reader.read(name, ()) for name in reader.tensors if not name.startswith("optimizer.")}


def test_another_models_checkpoint_is_refused_before_anything_is_built(root: Path, alone: Any) -> None:
    other = root / "other"
    make_model_dir(other / "model", tied=True, vocab_size=VOCABULARY, num_hidden_layers=3, hidden_size=48)
    shutil.copytree(root / "data", other / "data")
    shutil.copytree(root / "alone", other / "run")
    match = (
        r"CheckpointError: .*step_00000006 is of another model: hidden_size is 32 there and 48 here, "
        r"num_layers is 4 there and 3 here: train the model it was saved from, or remove .*checkpoints"
    )
    for processes in (1, 2):
        with pytest.raises(RankError, match=match):
            run_ranks(processes, _train_without_building, other, {})


def _train(root: Path, options: dict[str, Any]) -> Any:
    """The run, and the sample ids of every step that its plan was asked for, in order."""
    from megatron_lopd.data.dataset import TrainingData
    from megatron_lopd.data.batch_plan import BatchPlan

    names = TrainingData(root / "data").sample_ids
    asked: dict[int, list[str]] = {}
    samples = BatchPlan.samples

    def recorded(plan: BatchPlan, step: int) -> Any:
        positions = samples(plan, step)
        asked[step] = [names[position] for position in positions]
        return positions

    BatchPlan.samples = recorded  # type: ignore[method-assign]
    return train(root, **options), asked


def _train_without_building(root: Path, options: dict[str, Any]) -> Any:
    from megatron_lopd.training import loop

    def build(*arguments: Any) -> Any:
        raise AssertionError("the model was built")

    loop.build_model = build
    return train(root, **options)
