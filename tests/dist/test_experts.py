"""Qwen3-MoE training gives the same numbers however the experts are laid over the ranks."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import run_ranks

from megatron_lopd.config import OptimizerConfig, ParallelConfig, TrainConfig
from megatron_lopd.data.packing import Padding
from tests.training_zoo import VOCABULARY, make_root, train

SINGLE = ParallelConfig()
LAYOUTS = {
    "EP2": ParallelConfig(expert=2, processes=2),
    "ETP2": ParallelConfig(expert_tensor=2, processes=2),
    "TP2, ETP1": ParallelConfig(tensor=2, expert_tensor=1, processes=2),
    "EP2 x DP2": ParallelConfig(expert=2, processes=4),
    "EP4": ParallelConfig(expert=4, processes=4),
    "TP2 x EP2, ETP1": ParallelConfig(tensor=2, expert=2, expert_tensor=1, processes=4),
    "TP2 x EP2, ETP2": ParallelConfig(tensor=2, expert=2, processes=4),
    "PP2 x EP2": ParallelConfig(pipeline=2, expert=2, processes=4),
    "CP2 x EP2": ParallelConfig(context=2, expert=2, processes=2),
}
# objective -> where its weights are from: drawn alike at every layout, or read from a Hugging Face directory
OBJECTIVES = {"sft": "drawn", "sampled_reverse_kl": "read"}
STEPS = 5
CLIP = 0.1  # below every norm here

# (this rank's place in the group that splits it, axis it is split along or None, blocks along it, gradient)
Shard = tuple[int, int | None, int, torch.Tensor]


@dataclass(frozen=True)
class Trained:
    """What one rank saw: each step's loss and gradient norm, and the first step's gradients by name.

    `clipped`: the first step's norm after clipping.
    """

    losses: list[float]
    norms: list[float]
    clipped: float
    gradients: dict[str, Shard]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("moe"), tied=False, family="qwen3_moe")


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, Trained]:
    [trained] = run_ranks(1, train_some_steps, root, SINGLE)
    return trained


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradients_do_not_depend_on_where_experts_are(
    root: Path, alone: dict[str, Trained], layout: str
) -> None:
    parallel = LAYOUTS[layout]
    ranks = run_ranks(parallel.processes, train_some_steps, root, parallel)
    for objective in OBJECTIVES:
        expected = alone[objective]
        reference = whole_gradients([expected])
        for trained in (rank[objective] for rank in ranks):
            assert trained.losses[0] == pytest.approx(expected.losses[0], rel=1e-5)
            assert trained.losses == pytest.approx(expected.losses, rel=1e-4)
            assert trained.norms == pytest.approx(expected.norms, rel=1e-4)
            assert trained.clipped == pytest.approx(CLIP, rel=1e-4)
        gradients = whole_gradients([rank[objective] for rank in ranks])
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
        assert expected.norms[0] == pytest.approx(norm, rel=1e-4), "of every weight, counted once"
        assert gradients.keys() == reference.keys()
        for name, gradient in gradients.items():
            error = (gradient - reference[name]).norm() / reference[name].norm()
            assert error < 1e-4, f"{objective}: {name}: {error}"


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


@pytest.mark.parametrize("layout", ["EP2", "TP2 x EP2, ETP2"])
def test_experts_that_no_token_chooses_have_zero_gradients(root: Path, layout: str) -> None:
    """Experts 2 and 3 get nothing on any rank: all that the second expert parallel rank holds."""
    [expected] = run_ranks(1, one_step_on_two_experts, root, SINGLE)
    parallel = LAYOUTS[layout]
    ranks = run_ranks(parallel.processes, one_step_on_two_experts, root, parallel, timeout=60)
    reference, gradients = whole_gradients([expected]), whole_gradients(ranks)
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
    for name, gradient in whole_gradients([bare]).items():
        # The padding makes every expert's matrix products longer, which are then summed in another order.
        error = (padded.gradients[name][3] - gradient).norm() / gradient.norm()
        assert error < 1e-5, f"{name}: {error}"


def whole_gradients(trained: list[Trained]) -> dict[str, torch.Tensor]:
    """Put the shards of every gradient together again, without the rows that pad the vocabulary."""
    shards: dict[str, dict[int, Shard]] = {}
    for rank in trained:
        for name, shard in rank.gradients.items():
            known = shards.setdefault(name, {}).setdefault(shard[0], shard)
            torch.testing.assert_close(shard[3], known[3], rtol=0, atol=0)  # replicas move alike
    whole = {}
    for name, by_place in shards.items():
        ordered = [by_place[place] for place in range(len(by_place))]
        _, axis, blocks, gradient = ordered[0]
        if axis is not None:
            parts = [shard[3].unflatten(axis, (blocks, -1)) for shard in ordered]
            gradient = torch.cat(parts, axis + 1).flatten(axis, axis + 1)
        whole[name] = gradient[:VOCABULARY] if "word_embeddings" in name or "output" in name else gradient
    return whole


# ---- in the ranks


def run_job(root: Path, work: str, parallel: ParallelConfig) -> Any:
    return train(root, work, parallel=parallel, keep_checkpoints=3)


def train_some_steps(root: Path, parallel: ParallelConfig) -> dict[str, Trained]:
    from megatron_lopd.convert.load import load_hf_weights
    from megatron_lopd.mcore.parallel import model_parallel

    with model_parallel(parallel, seed=0) as ranks:
        trained = {}
        for objective, weights in OBJECTIVES.items():
            job = Job(root, parallel, ranks, objective)
            if weights == "read":
                for chunk in job.chunks:
                    load_hf_weights(chunk, job.arch, root / "model")
            trained[objective] = job.train(STEPS)
        return trained


def one_step_on_two_experts(root: Path, parallel: ParallelConfig) -> Trained:
    """Of each token's four router logits one is above zero, the first or the second; top 1 is chosen."""
    from megatron_lopd.mcore.parallel import model_parallel

    with model_parallel(parallel, seed=0) as ranks:
        job = Job(root, parallel, ranks, "sft", top_k=1, normalize_top_k=False)
        for layer in job.chunks[0].decoder.layers:
            weight = layer.mlp.router.weight.detach()  # [experts, h]
            weight[1], weight[2:] = -weight[0], 0
        return job.train(1)


def one_step_bare_and_padded(root: Path) -> tuple[Trained, Trained]:
    from megatron_lopd.mcore.parallel import model_parallel

    with model_parallel(SINGLE, seed=0) as ranks:
        bare, padded = (
            Job(root, SINGLE, ranks, "sft", padding=Padding(total=total)).train(1) for total in (1, 48)
        )
        return bare, padded


class Job:
    """A few optimizer steps on the data below `root`, with the weights as drawn."""

    def __init__(
        self,
        root: Path,
        parallel: ParallelConfig,
        ranks: Any,
        objective: str,
        padding: Padding | None = None,
        **experts: Any,
    ) -> None:
        from megatron_lopd.data.dataset import TrainingData
        from megatron_lopd.mcore.architecture import read_architecture
        from megatron_lopd.mcore.model import build_model
        from megatron_lopd.objectives import get_objective
        from megatron_lopd.training.step import BatchLoader

        self.config = TrainConfig(
            optimizer=OptimizerConfig(lr=1e-3, clip_grad=CLIP),
            steps=STEPS,
            global_batch_size=16,
            micro_batch_tokens=64,
        )
        arch = read_architecture(root / "model")
        assert arch.experts is not None
        self.arch = replace(arch, experts=replace(arch.experts, **experts))
        self.chunks = build_model(self.arch, parallel, "fp32", seed=0)
        self.ranks, self.objective = ranks, get_objective(objective)
        self.loader = BatchLoader.of(TrainingData(root / "data", root / "data"), self.config, parallel, ranks)
        if padding is not None:
            self.loader = replace(self.loader, padding=padding)

    def train(self, steps: int) -> Trained:
        from megatron_lopd.data.plan import BatchPlan
        from megatron_lopd.mcore import compat
        from megatron_lopd.mcore.optimizer import build_optimization, guarded_step, zero_gradients
        from megatron_lopd.training.metrics import Counts, summarize
        from megatron_lopd.training.step import run_micro_batches

        optimization = build_optimization(self.chunks, self.config.optimizer, "fp32", steps)
        plan = BatchPlan(len(self.loader.data), self.config.global_batch_size, 0)
        device = compat.device()
        losses, norms, clipped, gradients = [], [], 0.0, {}
        for step in range(steps):
            batches = self.loader.micro_batches(plan.samples(step).tolist())
            zero_gradients(optimization)
            parts = run_micro_batches(optimization.chunks, self.objective, batches, 64, device)
            gradients = gradients or first_gradients(optimization.chunks, self.arch)
            norms.append(guarded_step(optimization)[0])
            clipped = clipped or optimization.optimizer.get_grad_norm()
            counts = Counts.of(batches, device)
            losses.append(summarize(parts, counts, self.objective, self.ranks, device)["loss"])
        return Trained(losses, norms, clipped, gradients)


def first_gradients(chunks: list[Any], arch: Any) -> dict[str, Shard]:
    from megatron_lopd.mcore.experts import tensor_split
    from megatron_lopd.mcore.names import parameters_by_name

    for chunk in chunks:
        gather_gradients(chunk)
    return {
        name: (
            tensor_split(weight)[0] if getattr(weight, "tensor_model_parallel", False) else 0,
            weight.partition_dim if getattr(weight, "tensor_model_parallel", False) else None,
            getattr(weight, "partition_stride", 1),
            weight.main_grad.clone(),
        )
        for chunk in chunks
        for name, weight in parameters_by_name(chunk.module, arch).items()
    }


def gather_gradients(wrapped: Any) -> None:
    """Make every gradient whole: the distributed optimizer leaves each rank its part of the buffers."""
    for buffer in (*wrapped.buffers, *wrapped.expert_parallel_buffers):
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            parts = list(bucket.grad_data.chunk(group.size()))
            torch.distributed.all_gather(parts, parts[group.rank()].clone(), group=group)
