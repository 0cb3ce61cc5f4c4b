"""What the matrix of layouts trains: the table of layouts, tiny models, samples, and five steps in a rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from steps import Trained, train_steps

from megatron_lopd.config import OptimizerConfig, ParallelConfig, TrainConfig, WeightsConfig
from megatron_lopd.data.records import Rollout, Sample, Score, TopK
from megatron_lopd.objectives import SampledReverseKlOptions, TopKReverseKlOptions
from tests.model_zoo import make_model_dir
from tests.training_zoo import VOCABULARY

STEPS = 5
CLIP = 0.1  # below every gradient norm here
SAMPLES, BATCH, K = 20, 8, 3

MODELS: dict[str, dict[str, Any]] = {
    "tied": {"family": "qwen3", "tied": True},
    "untied, with bias": {"family": "qwen2"},
    "experts": {"family": "qwen3_moe"},
}


@dataclass(frozen=True)
class Layout:
    """One column of the matrix; `tokens` is the token budget of a micro-batch, which decides the packing.

    What divides the work in a way that others also have is nightly; `release`: also on the newest Megatron-Core.
    """

    parallel: ParallelConfig
    models: tuple[str, ...] = ("tied",)
    tokens: int = 64
    nightly: bool = False
    release: bool = False


ALL = tuple(MODELS)
DENSE = ("tied", "untied, with bias")
EXPERTS = ("experts",)

# Data parallelism always comes with the distributed optimizer, and with its communication overlapped.
LAYOUTS: dict[str, Layout] = {
    "one process": Layout(ParallelConfig(), ALL),
    "micro-batches of 24 tokens": Layout(ParallelConfig(), tokens=24),
    "micro-batches of 200 tokens": Layout(ParallelConfig(), ("tied", "experts"), tokens=200, nightly=True),
    "recompute core_attn": Layout(ParallelConfig(recompute="core_attn"), ("tied", "experts"), nightly=True),
    "recompute selective": Layout(ParallelConfig(recompute="selective"), ("tied", "experts"), nightly=True),
    "recompute full": Layout(ParallelConfig(recompute="full"), ALL),
    "TP2": Layout(
        ParallelConfig(tensor=2, sequence=False, processes=2), ("untied, with bias",), nightly=True
    ),
    "TP2 + SP": Layout(ParallelConfig(tensor=2, processes=2), ALL, release=True),
    "TP2 + SP, recompute full": Layout(ParallelConfig(tensor=2, recompute="full", processes=2), nightly=True),
    "TP2 + SP, recompute selective": Layout(
        ParallelConfig(tensor=2, recompute="selective", processes=2), ("tied", "experts"), nightly=True
    ),
    "PP2": Layout(ParallelConfig(pipeline=2, processes=2), DENSE, nightly=True),
    "PP2 + VPP2": Layout(
        ParallelConfig(pipeline=2, virtual_pipeline=2, processes=2), ("tied", "experts"), tokens=32, release=True
    ),
    "CP2": Layout(ParallelConfig(context=2, processes=2), ("tied", "experts"), release=True),
    "CP2, recompute core_attn": Layout(ParallelConfig(context=2, recompute="core_attn", processes=2)),
    "DP2, distributed optimizer": Layout(ParallelConfig(processes=2), ALL, release=True),
    "EP2": Layout(ParallelConfig(expert=2, processes=2), EXPERTS, release=True),
    "ETP2": Layout(ParallelConfig(expert_tensor=2, processes=2), EXPERTS),
    "TP2, ETP1": Layout(ParallelConfig(tensor=2, expert_tensor=1, processes=2), EXPERTS, nightly=True),
    "CP2 x EP2": Layout(ParallelConfig(context=2, expert=2, processes=2), EXPERTS, nightly=True),
    "DP4": Layout(ParallelConfig(processes=4), nightly=True),
    "TP2 x DP2": Layout(ParallelConfig(tensor=2, processes=4), nightly=True),
    "TP2 x PP2": Layout(
        ParallelConfig(tensor=2, pipeline=2, processes=4), ("untied, with bias",), nightly=True
    ),
    "TP2 x CP2": Layout(ParallelConfig(tensor=2, context=2, processes=4), ("untied, with bias",)),
    "CP4": Layout(ParallelConfig(context=4, processes=4), nightly=True),
    "PP2 x CP2": Layout(ParallelConfig(pipeline=2, context=2, processes=4), nightly=True),
    "PP2 + VPP2 x DP2": Layout(ParallelConfig(pipeline=2, virtual_pipeline=2, processes=4), nightly=True),
    "PP4": Layout(ParallelConfig(pipeline=4, processes=4), nightly=True),
    "TP2 x PP2 + VPP2": Layout(
        ParallelConfig(tensor=2, pipeline=2, virtual_pipeline=2, processes=4), nightly=True
    ),
    "EP2 x DP2": Layout(ParallelConfig(expert=2, processes=4), EXPERTS, nightly=True),
    "TP2 x EP2, ETP1": Layout(ParallelConfig(tensor=2, expert=2, expert_tensor=1, processes=4), EXPERTS, release=True),
    "EP4": Layout(ParallelConfig(expert=4, processes=4), EXPERTS, nightly=True),
    "TP2 x EP2, ETP2": Layout(ParallelConfig(tensor=2, expert=2, processes=4), EXPERTS, nightly=True),
    "PP2 x EP2": Layout(ParallelConfig(pipeline=2, expert=2, processes=4), EXPERTS, nightly=True),
}

# What is trained in every cell: the objective's name, and its options.
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name, {}) for name in ("sft", "sampled_reverse_kl", "topk_reverse_kl")
}
ONE = "topk_reverse_kl"  # of several tokens of each row
# They differ from those in what is done to a token alone. So they go where that can go wrong: a split
# vocabulary, responses cut between ranks, responses packed otherwise; with the first of the layout's models.
# With this data clip, horizon and threshold each fall on some tokens and spare others.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "topk_forward_kl, horizon": ("topk_forward_kl", {"weights": WeightsConfig(horizon=6)}),
    "sampled_reverse_kl, clipped, extrapolation": (
        "sampled_reverse_kl",
        {"options": SampledReverseKlOptions("clipped", 0.2, extrapolation=1.25)},
    ),
    "topk_reverse_kl, entropy, position": (
        "topk_reverse_kl",
        {"weights": WeightsConfig(position=2.0), "options": TopKReverseKlOptions(entropy=0.85)},
    ),
    "fixed_negative": ("fixed_negative", {}),
}
WITH_OPTIONS = ("one process", "micro-batches of 24 tokens", "TP2 + SP", "CP2, recompute core_attn")

Runs = dict[tuple[str, str, str], Trained]  # layout, model, loss


def losses_of(layout: str, model: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """What is trained in a cell of the matrix."""
    extra = layout in WITH_OPTIONS and model == LAYOUTS[layout].models[0]
    return LOSSES | OPTIONS if extra else LOSSES


def make_models(root: Path) -> Path:
    """A directory for each of MODELS, below `root`; four layers, so that two stages of two chunks go in."""
    for name, options in MODELS.items():
        make_model_dir(root / name, vocab_size=VOCABULARY, num_hidden_layers=4, **options)
    return root


class Samples:
    """In TrainingData's place: random rollouts, scored by a teacher of random distributions."""

    def __init__(self) -> None:
        self.samples = [_sample(number) for number in range(SAMPLES)]
        self.lengths = np.array(
            [len(s.rollout.prompt_tokens) + len(s.rollout.response_tokens) for s in self.samples]
        )

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, index: int) -> Sample:
        return self.samples[index]


def _sample(number: int) -> Sample:
    rng = np.random.default_rng(number)
    prompt = rng.integers(1, VOCABULARY, rng.integers(1, 9), dtype=np.int32)
    response = rng.integers(1, VOCABULARY, rng.integers(1, 14), dtype=np.int32)
    behaviour = -rng.uniform(1, 4, len(response)).astype(np.float32)
    teacher = torch.from_numpy(rng.normal(size=(len(response), VOCABULARY))).log_softmax(-1)
    chosen = torch.from_numpy(response.astype(np.int64))[:, None]
    likeliest = teacher.topk(K)
    others = teacher.scatter(1, likeliest.indices, -torch.inf).scatter(1, chosen, -torch.inf)
    top_k = TopK(
        likeliest.indices.numpy().astype(np.int32),
        likeliest.values.numpy().astype(np.float32),
        others.logsumexp(-1).numpy().astype(np.float32),
    )
    score = Score(str(number), teacher.gather(1, chosen)[:, 0].numpy().astype(np.float32), top_k)
    return Sample(Rollout(str(number), prompt, response, "stop", behaviour), score)


# ---- in the ranks


def train_layouts(root: Path, names: list[str], whole: bool = True) -> Runs:
    """Every layout of `names` one after another, each with its models and their losses.

    Not `whole`: with two models, tied or not, and one loss.
    """
    from megatron_lopd.mcore.process_groups import model_parallel

    runs = {}
    for name in names:
        layout = LAYOUTS[name]
        with model_parallel(layout.parallel, seed=0) as ranks:
            for model in layout.models if whole else layout.models[:2]:
                losses = losses_of(name, model) if whole else {ONE: LOSSES[ONE]}
                for loss, (objective, options) in losses.items():
                    runs[name, model, loss] = _train(root / model, layout, ranks, objective, options)
    return runs


def train_in_small_buckets(root: Path, names: list[str], whole: bool = True) -> Runs:
    """`train_layouts` with a bucket for every weight: as many reductions and gathers at once as there can be."""
    from functools import partial

    from megatron_lopd.mcore import optimizer

    optimizer.DistributedDataParallelConfig = partial(optimizer.DistributedDataParallelConfig, bucket_size=1)
    return train_layouts(root, names, whole)


def train_with_rows_of_other_tokens(root: Path, name: str, field: str) -> Runs:
    """`train_layouts` of `name`, a context parallel one, with the first rows of `field` in place of its own."""
    from dataclasses import replace

    from megatron_lopd.mcore import loader

    slice_rightly = loader.slice_micro_batch

    def slice_wrongly(batch: Any, size: int, rank: int) -> Any:
        part = slice_rightly(batch, size, rank)
        return replace(part, **{field: getattr(batch, field)[: len(getattr(part, field))]})

    loader.slice_micro_batch = slice_wrongly
    return train_layouts(root, [name])


def _train(model_dir: Path, layout: Layout, ranks: Any, objective: str, options: dict[str, Any]) -> Trained:
    """Weights as they are drawn for sft, and as they are read for the rest: both are laid out alike."""
    from megatron_lopd.convert.load_model import load_hf_weights
    from megatron_lopd.families.architecture import read_architecture
    from megatron_lopd.mcore.model import build_model
    from megatron_lopd.mcore.loader import BatchLoader

    config = TrainConfig(
        optimizer=OptimizerConfig(lr=1e-3, clip_grad=CLIP),
        steps=STEPS,
        global_batch_size=BATCH,
        micro_batch_tokens=layout.tokens,
        **({} if objective == "sft" else {"objective": objective} | options),
    )
    arch = read_architecture(model_dir)
    model = build_model(arch, layout.parallel, "fp32", seed=0)
    if objective != "sft":
        for chunk in model:
            load_hf_weights(chunk, arch, model_dir)
    data: Any = Samples()
    loader = BatchLoader.of(data, config, layout.parallel, ranks)
    return train_steps(model, arch, loader, objective, ranks, STEPS)
