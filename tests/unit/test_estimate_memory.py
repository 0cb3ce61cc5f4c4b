from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_lopd.config import ParallelConfig
from megatron_lopd.data.records import Rollout, Score, TopK
from megatron_lopd.data.schemas import ROLLOUTS, scores_kind
from megatron_lopd.data.shards import write_shard
from megatron_lopd.estimate.memory import (
    LOGIT_BYTES,
    MOST_LOGIT_BYTES,
    Training,
    engine_memory,
    kv_bytes,
    layer_activations,
    logit_rows,
    training_memory,
)
from megatron_lopd.estimate.stages import CHECKPOINT, ROLLOUT, SCORE, SCORE_TAIL, SCORE_TOP_K
from megatron_lopd.families.memory_shapes import Shape, published, read_shape
from tests.training_zoo import make_root, train
from tools.bench.plan import DENSE, compare_activations, compare_flops

PUBLISHED = published()

MICRO_BATCH = Training(16384, "bf16", fp8=False)


def test_activations_are_what_autograd_keeps() -> None:
    predicted, measured = compare_activations(DENSE)
    # The norms' reciprocal roots, a number a token and head, are not in the formula: 0.14% at this width.
    assert predicted == pytest.approx(measured, rel=2e-3)


def test_flops_are_what_torch_counts() -> None:
    predicted, counted = compare_flops(DENSE)
    assert predicted == counted


def test_the_chunk_of_logits_is_the_operation_s_own() -> None:
    from megatron_lopd.ops.row_chunks import CHUNK_BYTES

    assert CHUNK_BYTES["cuda"] == LOGIT_BYTES


def test_a_chunk_of_logits_takes_what_training_leaves_free() -> None:
    """Rows of Qwen3-8B's 151,936 logits, 608 kB each: 1.25 GB of them at least, 2.5 GB at most."""
    arch, alone = PUBLISHED["Qwen3-8B"], ParallelConfig()
    used = training_memory(arch, alone, 1, MICRO_BATCH).total
    rows = [logit_rows(arch, alone, 1, MICRO_BATCH, used + free) for free in (-60e9, 0, 0.5e9, 60e9)]
    assert rows == [2048, 2048, 2816, 4096]
    # Two chunks at once, of half as many columns each: as many rows.
    assert logit_rows(arch, ParallelConfig(tensor=2, processes=2), 2, MICRO_BATCH, 1e12) == 4096


def test_log_probs_of_the_largest_vocabulary_take_at_most_3_gb() -> None:
    memory = training_memory(PUBLISHED["Qwen3-8B"], ParallelConfig(), 1, MICRO_BATCH)
    assert memory.log_probs + MOST_LOGIT_BYTES - LOGIT_BYTES < 3e9


def test_log_probs_take_no_memory_that_grows_with_tokens_times_vocabulary() -> None:
    arch = PUBLISHED["Qwen3-0.6B"]
    few, many = (
        training_memory(arch, ParallelConfig(), 1, replace(MICRO_BATCH, tokens=tokens)).log_probs
        for tokens in (16384, 32768)
    )
    assert many - few == 16384 * 1024 * 2 * 2  # their hidden states alone, and the gradient, in bf16


def test_fp8_takes_about_as_much_as_bf16_as_on_an_h100() -> None:
    """The allocator's peak in steps of an 8-layer cut of Qwen3-8B: bf16 61.5 GB, tensorwise and blockwise 62.

    So to half a GB; and half of one is for the scales and what is quantized only for a moment.
    """
    arch = replace(PUBLISHED["Qwen3-8B"], num_layers=8, tied=True)
    bf16, fp8 = (
        training_memory(arch, ParallelConfig(), 1, replace(MICRO_BATCH, fp8=fp8)) for fp8 in (False, True)
    )
    assert fp8.total - bf16.total == pytest.approx(0.5e9, abs=1e9)
    assert fp8.weights - bf16.weights == pytest.approx(2 * 8 * 193e6, rel=0.01)  # 193 million in a layer's
    assert bf16.total - bf16.reserved == pytest.approx(61.5e9, rel=0.05)


@pytest.mark.parametrize("part", ["weights", "gradients", "activations", "log_probs"])
def test_no_axis_makes_a_part_larger(part: str) -> None:
    """On as many GPUs. Not so the optimizer: norms are on every tensor rank, and fewer share each."""
    arch = PUBLISHED["Qwen3-8B"]
    alone = training_memory(arch, ParallelConfig(processes=8), 8, MICRO_BATCH)
    for axis in ("tensor", "context", "pipeline"):
        split = training_memory(arch, ParallelConfig(**{axis: 2, "processes": 8}), 8, MICRO_BATCH)  # type: ignore[arg-type]
        assert getattr(split, part) <= getattr(alone, part) * (1 + 1e-9), axis


def test_a_pipeline_s_first_stage_keeps_as_many_micro_batches_as_there_are_stages() -> None:
    arch = PUBLISHED["Qwen3-8B"]
    layer = layer_activations(arch, ParallelConfig(), MICRO_BATCH) * MICRO_BATCH.tokens
    plain = training_memory(arch, ParallelConfig(pipeline=4, processes=4), 4, MICRO_BATCH)
    assert plain.activations == pytest.approx(36 * layer)  # 9 layers of 4 micro-batches
    interleaved = ParallelConfig(pipeline=4, virtual_pipeline=3, processes=4)
    assert training_memory(arch, interleaved, 4, MICRO_BATCH).activations == pytest.approx(45 * layer)
    full = training_memory(arch, ParallelConfig(recompute="full"), 1, MICRO_BATCH)
    assert full.activations == pytest.approx(layer + 35 * 4096 * 2 * MICRO_BATCH.tokens)


def test_an_engine_runs_what_its_cache_holds() -> None:
    shape = Shape(PUBLISHED["Qwen3-8B"])
    assert kv_bytes(shape.arch, 2) == 147456  # 36 layers x (k and v) x 8 heads x 128 x 2 bytes
    found = engine_memory(shape, 2, batch=256, length=4096, memory_bytes=80e9, sizes=(1, 2, 4, 8))
    assert found is not None
    assert found.weights * found.tensor == 2 * shape.parameters
    assert found.kv_cache == found.running * 4096 * 147456 / found.tensor
    one_more = found.kv_cache / found.running
    assert found.weights + found.kv_cache <= 0.9 * 80e9 < found.weights + found.kv_cache + one_more
    assert engine_memory(Shape(PUBLISHED["Qwen3-32B"]), 4, 1, 4096, 80e9, (1,)) is None


@pytest.mark.parametrize("top_k", [0, 64])
def test_disk_is_what_shards_take(top_k: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rollouts, scores, tokens = [], [], 0
    for number in range(200):
        response = rng.integers(0, 151936, 800, dtype=np.int32)
        tokens += len(response)
        log_probs = -rng.exponential(1.0, len(response)).astype(np.float32)
        rollouts.append(Rollout(f"{number}", response[:1], response, "stop", log_probs))
        ids = np.sort(rng.integers(0, 151936, (len(response), top_k), dtype=np.int32))
        top = TopK(ids, -rng.exponential(1.0, ids.shape).astype(np.float32), log_probs) if top_k else None
        scores.append(Score(f"{number}", log_probs, top))
    write_shard(tmp_path / "rollouts.arrow", ROLLOUTS, rollouts)
    write_shard(tmp_path / "scores.arrow", scores_kind(top_k), scores)
    taken = sum(path.stat().st_size for path in tmp_path.iterdir())
    predicted = tokens * (ROLLOUT + SCORE + (SCORE_TAIL + SCORE_TOP_K * top_k if top_k else 0))
    # A record's own bytes, ids and offsets, weigh more on short responses: 3% is what 800 tokens leave.
    assert taken == pytest.approx(predicted, rel=0.03)


def test_disk_is_what_a_checkpoint_takes(tmp_path: Path) -> None:
    from megatron_lopd.checkpoint.torch_dist import TorchDistReader

    root = make_root(tmp_path, samples=4)
    train(root, steps=1, global_batch_size=4)
    reader = TorchDistReader(root / "run" / "checkpoints" / "step_00000001")
    tensors = [reader.read(key, ()) for key in reader.tensors]
    parameters = read_shape(str(root / "model")).parameters
    assert sum(x.numel() * x.element_size() for x in tensors) == parameters * (4 + CHECKPOINT)  # fp32
