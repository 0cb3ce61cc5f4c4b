from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from megatron_lopd.cli import main
from megatron_lopd.config import ParallelConfig
from megatron_lopd.estimate.gpu_kinds import GPUS
from megatron_lopd.estimate.hours import TokenWork
from megatron_lopd.estimate.memory import Training, training_memory
from megatron_lopd.estimate.micro_batches import STEP, MicroBatches, fitting_tokens, micro_batches
from megatron_lopd.families.memory_shapes import published

PUBLISHED = published()

MICRO_BATCH = Training(16384, "bf16", fp8=False)
BATCH = TokenWork(256, prompt=150, response=4096)
H100 = GPUS["h100"]
EIGHT_LAYERS = replace(PUBLISHED["Qwen3-8B"], num_layers=8, tied=True)


@pytest.mark.parametrize(
    ("model", "parallel"),
    [
        ("Qwen3-8B", ParallelConfig(tensor=4, processes=8)),
        ("Qwen3-8B", ParallelConfig(tensor=2, context=2, processes=8)),
        ("Qwen3-4B", ParallelConfig(recompute="full", processes=8)),
        ("Qwen3-30B-A3B", ParallelConfig(tensor=2, expert=8, expert_tensor=1, processes=16)),
    ],
    ids=["tensor", "context", "recompute", "expert"],
)
def test_the_most_tokens_fit_and_a_step_more_do_not(model: str, parallel: ParallelConfig) -> None:
    arch = PUBLISHED[model]
    found = fitting_tokens(arch, parallel, MICRO_BATCH, H100.memory_bytes, most=10**6)
    assert found is not None
    assert found % STEP == 0
    at, above = (
        training_memory(arch, parallel, parallel.processes, replace(MICRO_BATCH, tokens=tokens)).total
        for tokens in (found, found + STEP)
    )
    assert at <= H100.memory_bytes < above


def test_what_a_step_cannot_fill_is_not_asked_for() -> None:
    small = replace(BATCH, samples=5)  # 21,230 tokens
    found = micro_batches(PUBLISHED["Qwen3-0.6B"], ParallelConfig(), H100, MICRO_BATCH, small)
    assert found is not None
    assert (found.largest, found.count) == (21504, 1)
    assert found.fill == pytest.approx(21230 / 21504)
    shared = micro_batches(PUBLISHED["Qwen3-0.6B"], ParallelConfig(processes=4), H100, MICRO_BATCH, small)
    assert shared is not None
    assert shared.largest == 6144  # 5,307.5 on each of four ranks


def test_a_pipeline_keeps_enough_micro_batches_to_be_busy() -> None:
    parallel = ParallelConfig(pipeline=4, processes=8)
    few = replace(BATCH, samples=16)  # 33,968 tokens on each of two ranks
    found = micro_batches(PUBLISHED["Qwen3-8B"], parallel, H100, MICRO_BATCH, few)
    assert found is not None
    assert found.largest == 3072  # a sixteenth, 2,123, rounded up


def test_where_not_even_a_step_fits_there_is_none() -> None:
    assert micro_batches(PUBLISHED["Qwen3-32B"], ParallelConfig(), H100, MICRO_BATCH, BATCH) is None


def test_the_gpu_waits_where_it_was_seen_to() -> None:
    """At 16,384 tokens on an H100, Qwen3-0.6B's does and that of an 8-layer cut of Qwen3-8B does not."""

    def found(arch_name: str) -> MicroBatches:
        arch = EIGHT_LAYERS if arch_name == "cut" else PUBLISHED[arch_name]
        made = micro_batches(arch, ParallelConfig(), H100, MICRO_BATCH, BATCH)
        assert made is not None
        return made

    assert found("Qwen3-0.6B").waits_below > 16384 > found("cut").waits_below
    # Four ranks have a quarter of the work each to launch as many kernels for.
    alone, split = (
        micro_batches(PUBLISHED["Qwen3-4B"], parallel, H100, MICRO_BATCH, BATCH)
        for parallel in (ParallelConfig(recompute="full"), ParallelConfig(tensor=4, processes=4))
    )
    assert alone is not None
    assert split is not None
    assert math.isclose(split.waits_below, 4 * alone.waits_below, abs_tol=4 * STEP)


def test_plan_advises_it_where_it_pays_and_is_then_content(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ["plan", "examples/qwen3_4b/recipe.yaml", "--gpus", "h100:8"]
    assert main([*recipe, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    advised = [line.partition(":")[0] for line in plan["advice"]]
    sizes = {part["stage"]: part["micro_batches"] for part in plan["training"]}
    assert advised == [f"{stage}.micro_batch_tokens={made['largest']}" for stage, made in sizes.items()]
    assert main(recipe) == 0
    printed = capsys.readouterr().out
    assert all(f"faster: {override}: the GPU waits for the CPU below" in printed for override in advised)
    assert main([*recipe, "--json", *advised]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["advice"] == []
    assert all(part["own"]["fits"] and part["problem"] is None for part in plan["training"])
