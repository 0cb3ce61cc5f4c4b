"""Experts over the ranks, beside what matrix.py shows: checkpoints, experts without tokens, padding."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import run_ranks
from steps import Trained, train_steps, whole_gradients

from megatron_lopd.config import OptimizerConfig, ParallelConfig, TrainConfig
from megatron_lopd.data.packing import Padding
from tests.training_zoo import VOCABULARY, make_root, train

SINGLE = ParallelConfig()
LAYOUTS = {
    "EP2": ParallelConfig(expert=2, processes=2),
    "ETP2": ParallelConfig(expert_tensor=2, processes=2),
    "TP2 x EP2, ETP1": ParallelConfig(tensor=2, expert=2, expert_tensor=1, processes=4),
    "TP2 x EP2, ETP2": ParallelConfig(tensor=2, expert=2, processes=4),
    "PP2 x EP2": ParallelConfig(pipeline=2, expert=2, processes=4),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("moe"), tied=False, family="qwen3_moe")


def test_a_run_goes_on_where_experts_are_laid_out_anew(root: Path) -> None:
    """Each layout resumes from a checkpoint of the one before."""
    [(_, expected, _)] = run_ranks(1, run_job, root, "alone", SINGLE)
    for at_step, layout in ((0, "TP2 x EP2, ETP1"), (2, "PP2 x EP2"), (4, "ETP2"), (4, "alone")):
        for checkpoint in (root / "moved" / "checkpoints").glob("step_*"):
            if int(checkpoint.name.removeprefix("step_")) > at_step:
                shutil.rmtree(checkpoint)
        assert at_step == 0 or (root / "moved" / "checkpoints" / f"step_{at_step:08d}").is_dir()
        parallel = LAYOUTS.get(layout, SINGLE)
        for _, steps, _ in run_ranks(parallel.processes, run_job, root, "moved", parallel):
            for name in ("loss", "grad_norm", "lr"):
                # Rounding in another order, through six steps of Adam.
                seen = [step[name] for step in steps]
                assert seen == pytest.approx([step[name] for step in expected], rel=1e-5), (layout, name)


@pytest.mark.parametrize("layout", ["EP2", pytest.param("TP2 x EP2, ETP2", marks=pytest.mark.nightly)])
def test_experts_that_no_token_chooses_have_zero_gradients(root: Path, layout: str) -> None:
    """Experts 2 and 3 get nothing on any rank: all that the second expert parallel rank holds."""
    [expected] = run_ranks(1, one_step_on_two_experts, root, SINGLE)
    parallel = LAYOUTS[layout]
    ranks = run_ranks(parallel.processes, one_step_on_two_experts, root, parallel, timeout=60)
    reference, gradients = (
        whole_gradients(trained, VOCABULARY) for trained in ([expected], ranks)
    )
    for name, gradient in gradients.items():
        if ".experts.2." in name or ".experts.3." in name:
            assert torch.count_nonzero(gradient) == 0, name
        else:
            error = (gradient - reference[name]).norm() / reference[name].norm()
            assert error < 1e-4, f"{name}: {error}"
    for trained in ranks:
        assert trained.norms == pytest.approx(expected.norms, rel=1e-4)


def test_padding_goes_through_the_experts_and_leaves_no_trace(root: Path) -> None:
    [(bare, padded)] = run_ranks(1, one_step_bare_and_padded, root)
    assert padded.losses == pytest.approx(bare.losses, rel=1e-6)
    for name, gradient in whole_gradients([bare], VOCABULARY).items():
        # The padding makes every expert's matrix products longer, which are then summed in another order.
        error = (padded.gradients[name][3] - gradient).norm() / gradient.norm()
        assert error < 1e-5, f"{name}: {error}"


# ---- in the ranks


def run_job(root: Path, work: str, parallel: ParallelConfig) -> Any:
    return train(root, work, parallel=parallel, keep_checkpoints=3)


def one_step_on_two_experts(root: Path, parallel: ParallelConfig) -> Trained:
    """Of each token's four router logits one is above zero, the first or the second; top 1 is chosen."""
    from megatron_lopd.mcore.process_groups import model_parallel

    with model_parallel(parallel, seed=0) as ranks:
        step = Step(root, parallel, ranks, top_k=1, normalize_top_k=False)
        for layer in step.chunks[0].decoder.layers:
            weight = layer.mlp.router.weight.detach()  # [experts, h]
            weight[1], weight[2:] = -weight[0], 0
        return step.train()


def one_step_bare_and_padded(root: Path) -> tuple[Trained, Trained]:
    from megatron_lopd.mcore.process_groups import model_parallel

    with model_parallel(SINGLE, seed=0) as ranks:
        bare, padded = (Step(root, SINGLE, ranks, Padding(total=total)).train() for total in (1, 48))
        return bare, padded


class Step:
    """One step of sft on the data below `root`, from the weights as drawn."""

    def __init__(
        self,
        root: Path,
        parallel: ParallelConfig,
        ranks: Any,
        padding: Padding | None = None,
        **experts: Any,
    ) -> None:
        from megatron_lopd.data.dataset import TrainingData
        from megatron_lopd.families.architecture import read_architecture
        from megatron_lopd.mcore.model import build_model
        from megatron_lopd.mcore.loader import BatchLoader

        config = TrainConfig(
            optimizer=OptimizerConfig(lr=1e-3), steps=1, global_batch_size=16, micro_batch_tokens=64
        )
        arch = read_architecture(root / "model")
        assert arch.experts is not None
        self.arch = replace(arch, experts=replace(arch.experts, **experts))
        self.chunks = build_model(self.arch, parallel, "fp32", seed=0)
        self.ranks = ranks
        self.loader = BatchLoader.of(TrainingData(root / "data", root / "data"), config, parallel, ranks)
        if padding is not None:
            self.loader = replace(self.loader, padding=padding)

    def train(self) -> Trained:
        return train_steps(self.chunks, self.arch, self.loader, "sft", self.ranks, steps=1)
