"""Every architecture at every layout: log-probs against transformers in fp64, and weights out and in."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import run_ranks

from megatron_lopd.config import OptimizerConfig, ParallelConfig
from megatron_lopd.convert.offline import hf_to_megatron, megatron_to_hf
from tests.model_zoo import contents, make_model_dir
from tests.training_zoo import save_now

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "rope_parameters": LLAMA3_ROPE},
    "qwen2": {"family": "qwen2", "tied": True, "dtype": torch.bfloat16},
    "qwen2_untied": {"family": "qwen2"},
    "qwen3": {"family": "qwen3", "tied": True},
    "qwen3_moe": {"family": "qwen3_moe", "max_shard_size": "50KB"},
}
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
LAYOUTS = {
    "TP1": ParallelConfig(),
    "TP2": ParallelConfig(tensor=2, processes=2),
    "PP2": ParallelConfig(pipeline=2, processes=2),
    "PP2, interleaved": ParallelConfig(pipeline=2, virtual_pipeline=2, processes=2),
    "TP2 x PP2": ParallelConfig(tensor=2, pipeline=2, processes=4),
    "EP2": ParallelConfig(expert=2, processes=2),
    "TP2 x EP2, ETP1": ParallelConfig(tensor=2, expert=2, expert_tensor=1, processes=4),
}
LENGTHS = (9, 1, 23, 14)
VOCABULARY = 131


@dataclass(frozen=True)
class Zoo:
    root: Path
    oracle: dict[str, list[torch.Tensor]]  # fp64 log-prob of each document's tokens from the second on

    def hf(self, name: str) -> Path:
        return self.root / name

    def megatron(self, name: str) -> Path:
        return self.root / f"{name}-megatron"


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in LENGTHS]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("zoo")
    oracle = {}
    for name, options in MODELS.items():
        make_model_dir(root / name, **options)
        hf_to_megatron(root / name, root / f"{name}-megatron")
        model = AutoModelForCausalLM.from_pretrained(
            root / name,
            dtype=torch.float64,
            experts_implementation="eager",  # grouped matrix products have no fp64
        )
        oracle[name] = [next_token_log_probs(model, tokens) for tokens in documents()]
    return Zoo(root, oracle)


@torch.no_grad()
def next_token_log_probs(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    log_probs = model(tokens[None]).logits[0].log_softmax(-1)
    return log_probs[:-1].gather(1, tokens[1:, None])[:, 0]


# What each divides, others divide too.
NIGHTLY = ("PP2", "TP2 x PP2")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.nightly if name in NIGHTLY else ()) for name in LAYOUTS],
)
def session(request: pytest.FixtureRequest, zoo: Zoo) -> tuple[str, dict[str, Any]]:
    """What the last rank (the last stage's) saw at one layout, for every model."""
    layout: str = request.param
    parallel = LAYOUTS[layout]
    return layout, run_ranks(parallel.processes, run_layout, parallel, zoo.root, layout)[-1]


@pytest.mark.release
def test_log_probs_agree_with_transformers_in_fp64(session: tuple[str, dict[str, Any]], zoo: Zoo) -> None:
    _, models = session
    for name, seen in models.items():
        for packing in ("packed", "unpacked"):
            difference = (torch.cat(zoo.oracle[name]) - seen[packing]).abs().max().item()
            # The project's bound, in nats; fp32 rounding through 4 layers is some 1e-6.
            assert difference < 1e-4, f"{name}, {packing}: {difference} nats"


@pytest.mark.release
def test_megatron_reads_the_tools_checkpoint_at_any_layout(session: tuple[str, dict[str, Any]]) -> None:
    _, models = session
    for name, seen in models.items():
        assert seen["differs_from_megatron_checkpoint"] == [], name


@pytest.mark.release
def test_training_checkpoint_of_any_layout_becomes_the_model(
    session: tuple[str, dict[str, Any]], zoo: Zoo
) -> None:
    layout, models = session
    for name in models:
        out = zoo.root / f"{name}-exported-{layout}"
        megatron_to_hf(zoo.root / f"{name}-trained-{layout}", out, 50_000, hf_dir=zoo.hf(name))
        assert contents(out) == contents(zoo.hf(name)), name


# ---- in the ranks


def run_layout(parallel: ParallelConfig, root: Path, layout: str) -> dict[str, Any]:
    from megatron_lopd.mcore.process_groups import model_parallel

    with model_parallel(parallel, seed=0) as ranks:
        return {
            name: run_model(parallel, ranks, root, name, layout)
            for name in MODELS
            if parallel.expert == 1 or name == "qwen3_moe"  # a dense model is refused
        }


def run_model(parallel: ParallelConfig, ranks: Any, root: Path, name: str, layout: str) -> dict[str, Any]:
    from megatron.core import dist_checkpointing

    from megatron_lopd.convert.load_model import load_hf_weights
    from megatron_lopd.families.architecture import read_architecture
    from megatron_lopd.mcore.model import build_model
    from megatron_lopd.mcore.optimizer import build_optimization

    arch = read_architecture(root / name)
    chunks = build_model(arch, parallel, "fp32", seed=1)
    for chunk in chunks:
        load_hf_weights(chunk, arch, root / name)
    documents_ = documents()
    packed = forward_log_probs(chunks, [documents_[:2], documents_[2:]])
    unpacked = forward_log_probs(chunks, [[tokens] for tokens in documents_])

    precision = PRECISIONS[MODELS[name].get("dtype", torch.float32)]
    others = build_model(arch, parallel, precision, seed=2)
    state = {str(number): other.sharded_state_dict() for number, other in enumerate(others)}
    loaded = dist_checkpointing.load(state, str(root / f"{name}-megatron"))
    differs = []
    for number, (chunk, other) in enumerate(zip(chunks, others, strict=True)):
        other.load_state_dict(loaded[str(number)])
        mine = dict(chunk.named_parameters())
        differs += [key for key, value in other.named_parameters() if not torch.equal(value.float(), mine[key])]
    directory = root / f"{name}-trained-{layout}"
    directory.mkdir(exist_ok=True)
    save_now(directory, build_optimization(others, OptimizerConfig(), precision, total_steps=1), ranks)
    return {"packed": packed, "unpacked": unpacked, "differs_from_megatron_checkpoint": differs}


@torch.no_grad()
def forward_log_probs(chunks: list[Any], micro_batches: list[list[torch.Tensor]]) -> torch.Tensor | None:
    """fp32 log-probs of every token that has one before it; None but on the last pipeline stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_lopd.mcore.model import response_top_k

    def forward_step(batches: Any, model: Any) -> tuple[torch.Tensor, Any]:
        batch = next(batches)
        hidden = model(batch["tokens"], batch["position_ids"], batch["cu_seqlens"], batch["max_seqlen"])
        return hidden, partial(read_log_probs, batch)

    def read_log_probs(batch: dict[str, Any], hidden: torch.Tensor, **unused: Any) -> torch.Tensor:
        _, result = response_top_k(chunks[-1], hidden, batch["predict_index"], batch["response_tokens"], 0)
        return result.log_probs

    collected = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter([pack(documents) for documents in micro_batches]) for _ in chunks],
        model=chunks,
        num_microbatches=len(micro_batches),
        seq_length=1,  # unused: variable_seq_lengths
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return torch.cat(collected) if collected else None


def pack(documents: list[torch.Tensor]) -> dict[str, Any]:
    """A micro-batch by hand (not collate: the oracle stands alone), padded to even as TP 2 with SP needs."""
    total = sum(map(len, documents))
    documents = [*documents, torch.zeros(2 - total % 2, dtype=torch.int64)]
    ends = torch.tensor([0, *map(len, documents)]).cumsum(0)
    positions = [torch.arange(len(tokens)) for tokens in documents]
    starts = ends[: len(documents) - 1]
    return {
        "tokens": torch.cat(documents),
        "position_ids": torch.cat(positions),
        "cu_seqlens": ends.to(torch.int32),
        "max_seqlen": max(map(len, documents)),
        "predict_index": torch.cat(
            [start + place[:-1] for start, place in zip(starts, positions, strict=False)]
        ),
        "response_tokens": torch.cat([tokens[1:] for tokens in documents[:-1]]),
    }
