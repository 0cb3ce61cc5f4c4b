"""Peak memory and time of a loss over log-probs against the naive path, side by side.

    python tools/bench/logprobs.py [--quick] [--tokens N] [--rounds N]

Each makes log-probs of the response tokens, and a loss's gradients, from hidden states and output weight at
V = 151,936 and h = 1,024. Ours is what a training step calls; torch is the operation that it falls back on,
and is itself on a CPU. Naive: the whole logits in fp32, log_softmax, gather, autograd; its top-k pays for the
tail as well, by masking the chosen tokens out of the log-probs. On a CPU in fp32, on a GPU in bf16.
Every measurement is a process of its own, and the paths take turns. Peak memory is above the inputs and their
gradients: on a CPU the growth of the resident set (VmHWM) less the gradients, on a GPU the allocator's.
The last line is one JSON object: ratios are ours over naive, medians, the sampled objective's unless named.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from megatron_lopd.ops.log_probs import vocab_parallel_log_probs
from megatron_lopd.ops.softmax import ResponseLogProbs
from megatron_lopd.ops.token_loss import vocab_parallel_loss

VOCABULARY, HIDDEN, TOP_K = 151_936, 1024, 64
LogProbPath = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def sum_of_row(scored: ResponseLogProbs, rows: slice) -> Tensor:
    """Of all that is asked for, for each row."""
    if not scored.top_k_log_probs.shape[1]:
        return scored.log_probs
    return scored.log_probs + scored.top_k_log_probs.sum(1) + scored.tail_log_probs


def ours(hidden: Tensor, weight: Tensor, tokens: Tensor, ids: Tensor) -> Tensor:
    """What a training step calls."""
    ones = torch.ones(len(hidden), device=hidden.device)
    return vocab_parallel_loss(hidden, weight, tokens, ids, sum_of_row, ones, vocab_size=len(weight)).total


def by_torch(hidden: Tensor, weight: Tensor, tokens: Tensor, ids: Tensor) -> Tensor:
    """The operation of vocabulary blocks."""
    scored = vocab_parallel_log_probs(hidden, weight, tokens, ids, vocab_size=len(weight))
    return sum_of_row(scored, slice(None)).sum()


def naive(hidden: Tensor, weight: Tensor, tokens: Tensor, ids: Tensor) -> Tensor:
    """The same sum by the book."""
    log_probs = (hidden @ weight.t()).float().log_softmax(-1)
    chosen = log_probs.gather(1, tokens[:, None]).sum()
    if not ids.shape[1]:
        return chosen
    outside = log_probs.scatter(1, torch.cat([tokens[:, None], ids], 1), float("-inf"))
    return chosen + log_probs.gather(1, ids).sum() + outside.logsumexp(1).sum()


PATHS: dict[str, LogProbPath] = {"ours": ours, "torch": by_torch, "naive": naive}


def main() -> None:
    """Measure, print a line for each pair, and the JSON object."""
    parser = argparse.ArgumentParser(description="a loss over log-probs against the naive path")
    parser.add_argument("--quick", action="store_true", help="sampled alone, fewer tokens: under 50 seconds")
    parser.add_argument("--tokens", type=int, help="response tokens (4096; 1024 with --quick)")
    parser.add_argument("--rounds", type=int, help="measurements of each path (3; 2 with --quick)")
    arguments = parser.parse_args()
    tokens = arguments.tokens or (1024 if arguments.quick else 4096)
    rounds = arguments.rounds or (2 if arguments.quick else 3)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{tokens} tokens, V {VOCABULARY}, h {HIDDEN}, {device}, {rounds} rounds, medians", flush=True)
    figures: dict[str, Any] = {**compare("sampled", tokens, 0, device, rounds)}
    if not arguments.quick:
        figures[f"top_k_{TOP_K}"] = compare(f"top-k {TOP_K}", tokens, TOP_K, device, rounds)
    figures |= {"tokens": tokens, "vocabulary": VOCABULARY, "hidden": HIDDEN, "device": device}
    print(json.dumps(figures))


def compare(name: str, tokens: int, k: int, device: str, rounds: int) -> dict[str, float]:
    """The paths in turn, `rounds` times each; on a CPU ours is torch's."""
    paths = [path for path in PATHS if device == "cuda" or path != "torch"]
    runs: dict[str, list[tuple[float, int]]] = {path: [] for path in paths}
    for _ in range(rounds):
        for path, done in runs.items():
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                done.append(pool.apply(measure, (path, tokens, k, device)))
    seconds = {path: statistics.median(run[0] for run in done) for path, done in runs.items()}
    peak = {path: statistics.median(run[1] for run in done) for path, done in runs.items()}
    result = {"peak_ratio": peak["ours"] / peak["naive"], "time_ratio": seconds["ours"] / seconds["naive"]}
    for path in paths:
        print(f"{name:10} {path:6} {seconds[path]:8.3f} s {peak[path] / 2**20:9.0f} MiB", flush=True)
        result |= {f"{path}_seconds": seconds[path], f"{path}_peak_mib": peak[path] / 2**20}
    print(f"{name:10} {'ratio':6} {result['time_ratio']:8.3f}   {result['peak_ratio']:9.4f}", flush=True)
    return {key: round(value, 4) for key, value in result.items()}


def measure(path: str, tokens: int, k: int, device: str) -> tuple[float, int]:
    """In a fresh process: (seconds, peak bytes above inputs and gradients) of one forward and backward."""
    torch.manual_seed(0)
    forward_and_backward(path, *inputs(256, 1024, k, device))  # libraries load and threads start untimed
    hidden, weight, chosen, ids = inputs(tokens, VOCABULARY, k, device)
    before = start_peak(device)
    start = time.perf_counter()
    gradients = forward_and_backward(path, hidden, weight, chosen, ids)
    peak = read_peak(device)
    seconds = time.perf_counter() - start
    return seconds, peak - before - sum(gradient.nbytes for gradient in gradients)


def inputs(tokens: int, vocabulary: int, k: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [tokens, h], weight [vocabulary, h], the tokens [tokens] and ids [tokens, k]."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.empty(tokens, HIDDEN, device=device, dtype=dtype).uniform_(-1, 1)
    weight = torch.empty(vocabulary, HIDDEN, device=device, dtype=dtype).uniform_(-0.1, 0.1)
    chosen = torch.randint(vocabulary, (tokens, 1 + k), device=device)
    return hidden.requires_grad_(), weight.requires_grad_(), chosen[:, 0], chosen[:, 1:]


def forward_and_backward(
    path: str, hidden: Tensor, weight: Tensor, chosen: Tensor, ids: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of hidden and weight."""
    return torch.autograd.grad(PATHS[path](hidden, weight, chosen, ids), (hidden, weight))


def start_peak(device: str) -> int:
    """Bytes in use now; the peak is counted anew from here."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (proc(5))
    return int(psutil.Process().memory_info().rss)


def read_peak(device: str) -> int:
    """The most bytes in use since `start_peak`."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    (line,) = [row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
