"""Our training step against one that does what the published code does, in alternation.

    python tools/bench/step.py [--quick] [--tokens N] [--rounds N]

Ours: one forward and one backward, log-probs of the response positions alone (training/step.py). Published: a
reference forward, an old-log-prob forward, then the training forward and backward; each makes the logits of
every position, prompts too, and a log_softmax over the whole vocabulary. Both end in the same optimizer step.
Same model (the trainer's own PackedGPTModel), same packed batch, same objective: before anything is timed the
gradients of both are compared, and a difference beyond rounding ends the run.

The model is Qwen3-0.6B with every width divided by four: its 28 layers, its ratio of vocabulary to hidden
size (148) and so its share of work in the output layer. An eighth of the tokens are prompts, as with prompts
of some 150 tokens and answers of some 1,000. fp32 on a CPU; bf16 and the full width on a GPU.
The last line is one JSON object: `speedup` is published over ours, of median seconds a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_lopd.config import OptimizerConfig, ParallelConfig
from megatron_lopd.data.collate import MicroBatch, collate
from megatron_lopd.data.packing import Padding
from megatron_lopd.data.records import Rollout, Sample, Score
from megatron_lopd.families.architecture import Architecture, read_architecture
from megatron_lopd.mcore import compat
from megatron_lopd.mcore.model import build_model
from megatron_lopd.mcore.optimizer import Optimization, build_optimization, guarded_step, zero_gradients
from megatron_lopd.mcore.process_groups import model_parallel
from megatron_lopd.objectives import get_objective
from megatron_lopd.training.step import run_micro_batches

PROMPT, RESPONSE = 64, 448  # tokens a document, on average


def main() -> None:
    """Compare the gradients, time the steps, and print the JSON object."""
    parser = argparse.ArgumentParser(description="our single-forward step against the published one")
    parser.add_argument("--quick", action="store_true", help="fewer tokens and rounds: under 50 seconds")
    parser.add_argument("--tokens", type=int, help="tokens in the batch (4096; 1024 with --quick)")
    parser.add_argument("--rounds", type=int, help="steps of each kind (7; 3 with --quick)")
    arguments = parser.parse_args()
    documents = (arguments.tokens or (1024 if arguments.quick else 4096)) // (PROMPT + RESPONSE)
    rounds = arguments.rounds or (3 if arguments.quick else 7)
    gpu = torch.cuda.is_available()
    arch = architecture(1 if gpu else 4)
    precision: Literal["fp32", "bf16"] = "bf16" if gpu else "fp32"
    parallel = ParallelConfig()
    with model_parallel(parallel, seed=0):
        model = build_model(arch, parallel, precision)
        optimization = build_optimization(model, OptimizerConfig(lr=1e-6), precision, total_steps=10**6)
        batch = on_device(make_batch(arch, documents))
        steps = {"ours": our_gradients, "published": published_gradients}
        difference = compare(optimization, batch, 2e-2 if gpu else 1e-4)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(rounds):
            for name, gradients in steps.items():
                seconds[name].append(timed_step(optimization, batch, gradients))
                print(f"round {number + 1}: {name:9} {seconds[name][-1]:7.3f} s", flush=True)
    ours, published = (statistics.median(seconds[name]) for name in steps)
    result = {
        "speedup": round(published / ours, 3),
        "ours_seconds": round(ours, 4),
        "published_seconds": round(published, 4),
        "gradient_difference": difference,
        "tokens": batch.num_tokens,
        "response_tokens": len(batch.response_tokens),
        "vocabulary": arch.vocab_size,
        "hidden": arch.hidden_size,
        "layers": arch.num_layers,
        "device": compat.device().type,
    }
    print(json.dumps(result))


def architecture(divisor: int) -> Architecture:
    """Qwen3-0.6B, its widths and vocabulary divided by `divisor`."""
    whole = read_architecture(Path(__file__).parent / "qwen3_0.6b")
    sizes = ("hidden_size", "ffn_size", "num_heads", "num_kv_heads", "vocab_size")
    divided: dict[str, Any] = {name: getattr(whole, name) // divisor for name in sizes}
    return replace(whole, **divided)


def make_batch(arch: Architecture, documents: int) -> MicroBatch:
    """Random documents of unequal length, an eighth of their tokens prompts, with a teacher's log-probs."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(documents):
        stretch = 1 + (number % 2 - 0.5) * 0.5  # 0.75 and 1.25 in turn
        prompt, response = (
            rng.integers(1, arch.vocab_size, int(length * stretch), dtype=np.int32)
            for length in (PROMPT, RESPONSE)
        )
        kept = rng.uniform(-12, -8, (2, len(response))).astype(np.float32)
        rollout = Rollout(str(number), prompt, response, "length", kept[0])
        samples.append(Sample(rollout, Score(str(number), kept[1])))
    return collate(samples, "token_mean", Padding())


def on_device(batch: MicroBatch) -> MicroBatch:
    """So that neither step pays for the copy."""
    moved: dict[str, Any] = {
        name: value.to(compat.device()) for name, value in vars(batch).items() if isinstance(value, Tensor)
    }
    return replace(batch, **moved)


def our_gradients(optimization: Optimization, batch: MicroBatch) -> None:
    """The trainer's own step, up to the optimizer."""
    objective = get_objective("sampled_reverse_kl")
    run_micro_batches(optimization.chunks, objective, [batch], len(batch.tokens), compat.device())


def published_gradients(optimization: Optimization, batch: MicroBatch) -> None:
    """Three forwards over all positions, and the policy gradient's loss, with a ratio of 1 at first use."""
    (model,) = optimization.chunks
    with torch.no_grad():
        reference = whole_log_probs(model, batch, forward(model, batch))
        old = whole_log_probs(model, batch, forward(model, batch))

    def loss(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_probs = whole_log_probs(model, batch, hidden)
        assert batch.teacher_log_probs is not None
        ratio = (log_probs - old).exp()
        summed = -(batch.loss_weights * ratio * (batch.teacher_log_probs - old)).sum()
        count = torch.tensor(batch.loss_count, dtype=torch.int, device=hidden.device)
        return summed, count, (log_probs.detach() - reference).mean()

    def forward_step(batches: Iterator[MicroBatch], wrapped: torch.nn.Module) -> tuple[Tensor, Any]:
        return forward(wrapped, next(batches)), loss

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter([batch]),
        model=[model],
        num_microbatches=1,
        seq_length=len(batch.tokens),
        micro_batch_size=1,
        forward_only=False,
    )


def forward(model: torch.nn.Module, batch: MicroBatch) -> Tensor:
    """Hidden states [S, 1, h]."""
    hidden: Tensor = model(batch.tokens, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
    return hidden


def whole_log_probs(model: Any, batch: MicroBatch, hidden: Tensor) -> Tensor:
    """[R], by way of the logits and log_softmax of all S positions, and every position's next token."""
    weight: Tensor = model.module.output_weight()
    logits = hidden.squeeze(1) @ weight.t()  # [S, V]
    following = batch.tokens.roll(-1)
    log_probs = logits.float().log_softmax(-1).gather(1, following[:, None]).squeeze(1)  # [S]
    return log_probs[batch.predict_index]


def compare(optimization: Optimization, batch: MicroBatch, tolerance: float) -> float:
    """The largest relative difference, in norm, between the two gradients of a weight; ends the run past
    `tolerance`, which is what rounding can do.
    """
    both = []
    for gradients in (our_gradients, published_gradients):
        zero_gradients(optimization)
        gradients(optimization, batch)
        both.append([weight.main_grad.clone() for weight in optimization.chunks[0].parameters()])
    difference: float = max(
        ((ours - published).norm() / published.norm()).item() for ours, published in zip(*both, strict=True)
    )
    if not difference <= tolerance:
        raise SystemExit(f"the two steps' gradients differ by {difference:.2g}, more than {tolerance:g}")
    print(f"gradients agree to {difference:.2g}", flush=True)
    return difference


def timed_step(optimization: Optimization, batch: MicroBatch, gradients: Any) -> float:
    """Seconds of one whole step."""
    synchronize()
    start = time.perf_counter()
    zero_gradients(optimization)
    gradients(optimization, batch)
    guarded_step(optimization)
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
