"""The model's forward and backward give the same numbers at every layout (DESIGN section 6)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from gloo import run_ranks

from megatron_lopd.config import ParallelConfig
from megatron_lopd.mcore.architecture import Architecture, Experts

QWEN3 = Architecture(
    family="qwen3",
    num_layers=2,
    hidden_size=32,
    ffn_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=51,  # odd: padded at TP 2
    max_positions=64,
    norm_eps=1e-6,
    init_std=0.2,  # large, so that attention and experts are far from uniform
    tied=True,
    qkv_bias=False,
    qk_norm=True,
    rope_theta=1e4,
    rope_scaling=None,
    experts=None,
)
ARCHITECTURES = {
    "tied": QWEN3,
    "untied, qkv bias": replace(QWEN3, family="qwen2", tied=False, qkv_bias=True, qk_norm=False),
    "experts": replace(
        QWEN3,
        family="qwen3_moe",
        tied=False,
        experts=Experts(count=4, top_k=2, ffn_size=16, normalize_top_k=True),
    ),
}
LAYOUTS = {
    "TP2": ParallelConfig(tensor=2, sequence=False, processes=2),
    "TP2 + SP": ParallelConfig(tensor=2, processes=2),
    "PP2": ParallelConfig(pipeline=2, processes=2),
    "TP2 x PP2 + SP": ParallelConfig(tensor=2, pipeline=2, processes=4),
}
SINGLE = ParallelConfig()


Shard = tuple[int, int | None, int, torch.Tensor]  # tp rank, partition dim, partition stride, gradient


@dataclass(frozen=True)
class Step:
    """What one rank saw of one training step."""

    log_probs: torch.Tensor | None
    entropy: torch.Tensor | None
    gradients: dict[str, Shard]


def micro_batches() -> list[dict[str, torch.Tensor]]:
    """Documents of unequal length in micro-batches of unequal length, the last without a response."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for lengths, respond in (([5, 9, 2], True), ([20], True), ([2], False)):
        total = sum(lengths)
        ends = torch.tensor([0, *lengths]).cumsum(0)
        index = torch.cat([torch.arange(end - 2, end - 1) for end in ends[1:]] + [torch.arange(0, 3)])
        index = index if respond else index[:0]
        batches.append(
            {
                "tokens": torch.randint(51, (total,), generator=generator),
                "position_ids": torch.cat([torch.arange(length) for length in lengths]),
                "cu_seqlens": ends.int(),
                "max_seqlen": torch.tensor(max(lengths)),
                "predict_index": index,
                "response_tokens": torch.randint(51, (len(index),), generator=generator),
            }
        )
    return batches


def train_step(archs: dict[str, Architecture], parallel: ParallelConfig) -> dict[str, Step]:
    """One step of each architecture, in every rank."""
    from megatron_lopd.mcore.parallel import model_parallel

    with model_parallel(parallel, seed=0) as ranks:
        return {name: _train_step(arch, parallel, ranks.tp_rank) for name, arch in archs.items()}


def _train_step(arch: Architecture, parallel: ParallelConfig, tp_rank: int) -> Step:
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_lopd.mcore.model import build_model, response_log_probs

    model = build_model(arch, parallel, "fp32", seed=3)
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    model.config.finalize_model_grads_func = finalize_model_grads

    def forward_step(batches: Iterator[dict[str, torch.Tensor]], wrapped: torch.nn.Module) -> Any:
        batch = next(batches)
        hidden = wrapped(
            batch["tokens"], batch["position_ids"], batch["cu_seqlens"], int(batch["max_seqlen"])
        )

        def loss(hidden: torch.Tensor) -> Any:
            result = response_log_probs(model, hidden, batch["predict_index"], batch["response_tokens"])
            count = torch.tensor(len(batch["response_tokens"]), dtype=torch.int)
            return -result.log_probs.sum(), count, (result.log_probs.detach(), result.entropy)

        return hidden, loss

    batches = micro_batches()
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[wrapped],
        num_microbatches=len(batches),
        seq_length=20,
        micro_batch_size=1,
    )
    return Step(
        log_probs=torch.cat([log_probs for log_probs, _ in outputs]) if outputs else None,
        entropy=torch.cat([entropy for _, entropy in outputs]) if outputs else None,
        gradients={
            name: (
                tp_rank,
                weight.partition_dim if getattr(weight, "tensor_model_parallel", False) else None,
                getattr(weight, "partition_stride", 1),
                weight.main_grad.clone(),
            )
            for name, weight in _global_names(model)
        },
    )


def _global_names(model: Any) -> Iterator[tuple[str, Any]]:
    first = model.decoder.layers[0].layer_number - 1
    for name, weight in model.named_parameters():
        yield re.sub(r"layers\.(\d+)", lambda match: f"layers.{int(match[1]) + first}", name), weight


def whole_gradients(steps: list[Step], vocab_size: int) -> dict[str, torch.Tensor]:
    """Put the shards of every gradient together again, without the rows that pad the vocabulary."""
    shards: dict[str, dict[int, Shard]] = {}
    for step in steps:
        for name, shard in step.gradients.items():
            shards.setdefault(name, {})[shard[0]] = shard
    whole = {}
    for name, by_rank in shards.items():
        ordered = [by_rank[rank] for rank in sorted(by_rank)]
        _, dim, blocks, gradient = ordered[0]
        if dim is None:
            for other in ordered[1:]:  # replicated weights must move alike on all ranks
                torch.testing.assert_close(other[3], gradient, rtol=0, atol=0)
        else:
            parts = [shard[3].unflatten(dim, (blocks, -1)) for shard in ordered]
            gradient = torch.cat(parts, dim + 1).flatten(dim, dim + 1)
        is_vocabulary = "word_embeddings" in name or "output_layer" in name
        whole[name] = gradient[:vocab_size] if is_vocabulary else gradient
    return whole


@pytest.fixture(scope="module")
def one_process() -> dict[str, Step]:
    [steps] = run_ranks(1, train_step, ARCHITECTURES, SINGLE)
    return steps


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_and_backward_do_not_depend_on_the_layout(layout: str, one_process: dict[str, Step]) -> None:
    parallel = LAYOUTS[layout]
    archs = {k: v for k, v in ARCHITECTURES.items() if not (v.experts and layout == "TP2")}  # refused
    ranks = run_ranks(parallel.processes, train_step, archs, parallel)
    for name, arch in archs.items():
        expected, steps = one_process[name], [rank[name] for rank in ranks]
        for step in steps:
            if step.log_probs is not None:
                # fp32 sums in another order; log-probs here are up to 10 nats.
                torch.testing.assert_close(step.log_probs, expected.log_probs, rtol=0, atol=2e-5)
                torch.testing.assert_close(step.entropy, expected.entropy, rtol=0, atol=2e-5)
        assert any(step.log_probs is not None for step in steps)
        gradients = whole_gradients(steps, arch.vocab_size)
        if arch.tied and parallel.pipeline > 1:
            torch.testing.assert_close(
                gradients.pop("output_layer.weight"), gradients["embedding.word_embeddings.weight"]
            )
        reference = whole_gradients([expected], arch.vocab_size)
        assert gradients.keys() == reference.keys()
        for key, gradient in gradients.items():
            scale = reference[key].abs().max()
            assert scale > 0, key
            # Relative to the tensor's largest entry: small entries are differences of large terms.
            error = (gradient - reference[key]).abs().max() / scale
            assert error < 2e-5, f"{name}: {key}"
