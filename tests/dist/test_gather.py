"""The weights that go to a live sampler: to the bit those that were read, and those that export would write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import run_ranks
from matrix import Samples, make_models

from megatron_lopd.config import OptimizerConfig, ParallelConfig, TrainConfig
from tests.model_zoo import contents
from tests.training_zoo import save_now

TIED, BIAS, EXPERTS = "tied", "untied, with bias", "experts"
LAYOUTS: dict[str, tuple[ParallelConfig, tuple[str, ...], str]] = {
    "alone": (ParallelConfig(), (TIED,), "fp32"),
    "TP2": (ParallelConfig(tensor=2, processes=2), (BIAS,), "fp32"),
    "PP2": (ParallelConfig(pipeline=2, processes=2), (TIED,), "fp32"),
    "DP2, bf16": (ParallelConfig(processes=2), (TIED,), "bf16"),
    "CP2": (ParallelConfig(context=2, processes=2), (BIAS,), "fp32"),
    "TP2, ETP1": (ParallelConfig(tensor=2, expert_tensor=1, processes=2), (EXPERTS,), "fp32"),
    "PP2 + VPP2 x DP2": (ParallelConfig(pipeline=2, virtual_pipeline=2, processes=4), (TIED,), "fp32"),
    "TP2 x EP2, ETP1": (ParallelConfig(tensor=2, expert=2, expert_tensor=1, processes=4), (EXPERTS,), "fp32"),
    "TP2 x PP2": (ParallelConfig(tensor=2, pipeline=2, processes=4), (BIAS,), "fp32"),
}
Weights = dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("gather"))


@pytest.mark.parametrize("processes", [1, 2, pytest.param(4, marks=pytest.mark.nightly)])
def test_gathered_weights_are_those_read_and_those_exported(root: Path, processes: int) -> None:
    names = [name for name, (parallel, *_) in LAYOUTS.items() if parallel.processes == processes]
    ranks = run_ranks(processes, gather_all, root, names, timeout=300)
    for (layout, model), (before, after, exported) in ranks[0].items():
        if LAYOUTS[layout][2] == "fp32":
            assert before == contents(root / model)[0], (layout, model)
        assert after == exported, (layout, model)
        assert after != before, (layout, model)
        for rank in ranks:
            assert rank[layout, model][:2] == (before, after), (layout, model)


# ---- in the ranks


def gather_all(root: Path, names: list[str]) -> dict[tuple[str, str], tuple[Weights, Weights, Weights | None]]:
    from megatron_lopd.mcore.process_groups import model_parallel

    seen = {}
    for name in names:
        parallel, models, precision = LAYOUTS[name]
        with model_parallel(parallel, seed=0) as ranks:
            for model in models:
                seen[name, model] = gather(root, name, parallel, precision, ranks, model)
    return seen


def gather(
    root: Path, layout: str, parallel: ParallelConfig, precision: Any, ranks: Any, name: str
) -> tuple[Weights, Weights, Weights | None]:
    """The weights before and after a step, and on rank 0 those exported after it."""
    from megatron_lopd.convert.gather import WeightGatherer
    from megatron_lopd.convert.load_model import load_hf_weights
    from megatron_lopd.convert.offline import megatron_to_hf
    from megatron_lopd.families.architecture import read_architecture
    from megatron_lopd.mcore.model import build_model
    from megatron_lopd.mcore.optimizer import build_optimization

    arch = read_architecture(root / name)
    model = build_model(arch, parallel, precision, seed=0)
    for chunk in model:
        load_hf_weights(chunk, arch, root / name)
    optimization = build_optimization(model, OptimizerConfig(lr=1e-2), precision, 1)
    gatherer = WeightGatherer(optimization, arch)
    before = as_bytes(gatherer)
    one_step(optimization, parallel, ranks)
    after = as_bytes(gatherer)
    directory = root / f"{name} trained at {layout}"
    directory.mkdir(exist_ok=True)
    save_now(directory, optimization, ranks)
    exported = None
    if ranks.rank == 0:
        out = root / f"{name} exported at {layout}"
        megatron_to_hf(directory, out, 10**9, root / name)
        exported = contents(out)[0]
    torch.distributed.barrier()
    return before, after, exported


def as_bytes(gatherer: Any) -> Weights:
    return {
        name: (value.dtype, tuple(value.shape), value.contiguous().view(torch.uint8).numpy().tobytes())
        for name, value in gatherer.weights()
    }


def one_step(optimization: Any, parallel: ParallelConfig, ranks: Any) -> None:
    from megatron_lopd.mcore.optimizer import guarded_step, zero_gradients
    from megatron_lopd.objectives import get_objective
    from megatron_lopd.mcore.loader import BatchLoader
    from megatron_lopd.training.step import run_micro_batches

    data, config = Samples(), TrainConfig(steps=1, global_batch_size=8, micro_batch_tokens=64)
    batches = BatchLoader.of(data, config, parallel, ranks).micro_batches(range(8))
    zero_gradients(optimization)
    run_micro_batches(optimization.chunks, get_objective("sft"), batches, 64, torch.device("cpu"))
    assert guarded_step(optimization)[1]
