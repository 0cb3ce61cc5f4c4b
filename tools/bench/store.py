"""The score store against the published layout, on rollouts with Qwen3-like lengths.

    python tools/bench/store.py [--quick] [--samples N] [--dir DIR]

The published layout is one Parquet file of nested Python-float lists, read whole with pandas (which this
needs). Both are packed and collated by the same code, so that the layout alone differs. Reads are from a
warm page cache, in alternation, and medians are given. What a first batch takes is measured in fresh
processes: seconds from opening, and by how much the resident set grows, mapped file pages included.

The last line is one JSON object: our figures, the same keys of the other layout under "published", and
without --quick what opening, joining and planning a million samples takes, under "million".
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import psutil
from numpy.typing import NDArray

from megatron_lopd.artifacts.manifest import commit, plan_digest
from megatron_lopd.data.batch_plan import BatchPlan
from megatron_lopd.data.collate import MicroBatch, collate
from megatron_lopd.data.dataset import TrainingData, shard_name
from megatron_lopd.data.packing import Padding, pack
from megatron_lopd.data.records import FinishReason, Rollout, Sample, Score, TopK
from megatron_lopd.data.schemas import ROLLOUTS, SCORES, scores_kind
from megatron_lopd.data.shards import write_shard

VOCABULARY = 151_936
PROMPT_TOKENS = 100, 200
RESPONSE_TOKENS = 4096  # the most; log-normal below, about 1,600 on average
TOKEN_BUDGET = 16_384
GLOBAL_BATCH = 256
TOP_K = 64
SHARD_SAMPLES = 4096
MILLION = 1_000_000
REPEATS = 5
PLAN = plan_digest({}, {})  # of what no stage made


class Layout(Protocol):
    """What the loader reads: tokens a sample, and samples."""

    @property
    def lengths(self) -> NDArray[np.int64]: ...

    def sample(self, index: int) -> Sample: ...


class Published:
    """A Parquet file of nested lists, as a table in memory."""

    def __init__(self, directory: Path) -> None:
        self._frame = pd.read_parquet(directory / "data.parquet")
        prompts, responses = self._frame["prompt_ids"].map(len), self._frame["response_ids"].map(len)
        self.lengths = (prompts + responses).to_numpy(np.int64)

    def sample(self, index: int) -> Sample:
        row = self._frame.iloc[index]
        rollout = Rollout(
            row["sample_id"],
            np.asarray(row["prompt_ids"], np.int32),
            np.asarray(row["response_ids"], np.int32),
            row["finish_reason"],
            np.asarray(row["log_probs"], np.float32),
        )
        top_k = None
        if "top_k_ids" in row:
            top_k = TopK(
                np.stack(row["top_k_ids"]).astype(np.int32),
                np.stack(row["top_k_log_probs"]).astype(np.float32),
                np.asarray(row["tail_log_probs"], np.float32),
            )
        score = Score(row["sample_id"], np.asarray(row["teacher_log_probs"], np.float32), top_k)
        return Sample(rollout, score)


def open_ours(directory: Path) -> TrainingData:
    """Our layout, in one directory."""
    return TrainingData(directory, directory)


LAYOUTS: dict[str, Callable[[Path], Layout]] = {"ours": open_ours, "published": Published}


@dataclass(frozen=True)
class Sizes:
    """How much is measured: samples without and with a top k, and fresh processes started for each."""

    samples: int
    top_k_samples: int
    processes: int
    million: int


def main() -> None:
    """Make the data, measure both layouts and print what was found."""
    parser = argparse.ArgumentParser(description="the score store against nested lists in Parquet")
    parser.add_argument("--quick", action="store_true", help="end within 50 s on 2 cores")
    parser.add_argument("--samples", type=int, help="rollouts (4,096, quick 640)")
    parser.add_argument("--dir", help="where to work (default: temporary)")
    arguments = parser.parse_args()
    sizes = Sizes(640, 16, 1, 0) if arguments.quick else Sizes(4096, 128, 5, MILLION)
    sizes = replace(sizes, samples=arguments.samples or sizes.samples)
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        result = measure_all(Path(name), sizes)
    print(json.dumps(result))


def measure_all(root: Path, sizes: Sizes) -> dict[str, Any]:
    """Every figure of both layouts, by the names of the JSON object."""
    found: dict[str, dict[str, Any]] = {name: {} for name in LAYOUTS}
    for top_k, count, key in (
        (0, sizes.samples, "bytes_per_token"),
        (TOP_K, sizes.top_k_samples, "bytes_per_token_topk64"),
    ):
        directory = root / str(top_k)
        response_tokens = sum(len(each.rollout.response_tokens) for each in make(count, top_k))
        print(f"{count} samples, top k {top_k}: {response_tokens:,} response tokens", flush=True)
        for name, write in (("ours", write_ours), ("published", write_published)):
            began = time.perf_counter()
            write(directory / name, make(count, top_k), top_k)
            print(f"  {name} written in {time.perf_counter() - began:.1f} s", flush=True)
            size = sum(path.stat().st_size for path in (directory / name).iterdir())
            found[name][key] = round(size / response_tokens, 2)
    for name, values in measure_reads(root / "0", sizes).items():
        found[name] |= values
    for name, values in measure_reads(root / str(TOP_K), sizes).items():
        found[name] |= {f"{key}_topk64": value for key, value in values.items() if key != "packing_fill"}
    extra = {"million": measure_million(root / "million", sizes.million)} if sizes.million else {}
    return {**found["ours"], "published": found["published"], **extra}


def make(count: int, top_k: int) -> Iterator[Sample]:
    """The samples, made anew each time: ids as frequent as words are, log-probs mostly near 0."""
    for index in range(count):
        rng = np.random.default_rng(index)
        prompt = int(rng.integers(*PROMPT_TOKENS))
        response = int(np.clip(rng.lognormal(7.2, 0.65), 16, RESPONSE_TOKENS))
        tokens = (rng.zipf(1.2, prompt + response) % VOCABULARY).astype(np.int32)
        kept = -rng.gamma(0.3, 1.5, (2, response)).astype(np.float32)
        likeliest = None
        if top_k:
            ids = rng.integers(0, VOCABULARY, (response, top_k), dtype=np.int32)
            log_probs = -np.sort(rng.gamma(2, 4, (response, top_k)).astype(np.float32), axis=1)
            likeliest = TopK(ids, log_probs, -rng.gamma(2, 4, response).astype(np.float32))
        name = f"problem-{index}/0"
        finish: FinishReason = "stop" if response < RESPONSE_TOKENS else "length"
        rollout = Rollout(name, tokens[:prompt], tokens[prompt:], finish, kept[0])
        yield Sample(rollout, Score(name, kept[1], likeliest))


def write_ours(directory: Path, samples: Iterator[Sample], top_k: int) -> None:
    """Rollouts and scores, in shards."""
    everything = list(samples)
    for number, start in enumerate(range(0, len(everything), SHARD_SAMPLES)):
        part = everything[start : start + SHARD_SAMPLES]
        rollouts = (each.rollout for each in part)
        write_shard(directory / shard_name(ROLLOUTS, number), ROLLOUTS, rollouts, PLAN)
        scores = (each.score for each in part if each.score is not None)
        write_shard(directory / shard_name(SCORES, number), scores_kind(top_k), scores, PLAN)
    commit_shards(directory)


def commit_shards(directory: Path) -> None:
    """Have a manifest list them, without which none is read."""
    names = [path.name for path in directory.glob("*.arrow")]
    commit(
        directory, "rollouts", files=names, config={}, counts={}, versions={}, parents={}, lineage="proved"
    )


def write_published(directory: Path, samples: Iterator[Sample], top_k: int) -> None:
    """One row a sample, every array as a list of Python numbers."""
    rows = []
    for each in samples:
        assert each.score is not None
        assert each.rollout.log_probs is not None
        row: dict[str, Any] = {
            "sample_id": each.rollout.sample_id,
            "prompt_ids": each.rollout.prompt_tokens.tolist(),
            "response_ids": each.rollout.response_tokens.tolist(),
            "finish_reason": each.rollout.finish_reason,
            "log_probs": each.rollout.log_probs.tolist(),
            "teacher_log_probs": each.score.log_probs.tolist(),
        }
        if each.score.top_k is not None:
            row["top_k_ids"] = each.score.top_k.ids.tolist()
            row["top_k_log_probs"] = each.score.top_k.log_probs.tolist()
            row["tail_log_probs"] = each.score.top_k.tail_log_probs.tolist()
        rows.append(row)
    directory.mkdir(parents=True)
    pd.DataFrame(rows).to_parquet(directory / "data.parquet")


def measure_reads(root: Path, sizes: Sizes) -> dict[str, dict[str, Any]]:
    """Random access, the loader, and the first batch of a fresh process, the layouts in alternation."""
    opened = {name: layout(root / name) for name, layout in LAYOUTS.items()}
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in LAYOUTS}

    def note(name: str, figures: dict[str, float]) -> None:
        for key, value in figures.items():
            taken[name].setdefault(key, []).append(value)

    for repeat in range(REPEATS):
        for name, data in opened.items():
            note(name, {"random_access_us": random_access(data, repeat)})
            note(name, {"loader_tokens_per_s": loader(data, repeat)})
    for _ in range(sizes.processes):
        for name in opened:
            note(name, in_fresh_process(name, root / name))
    lengths = opened["ours"].lengths
    (micro_batches,) = pack(lengths, TOKEN_BUDGET, num_ranks=1)
    fill = round(float(lengths.sum()) / (TOKEN_BUDGET * len(micro_batches)), 4)
    return {
        name: {"packing_fill": fill} | {key: rounded(statistics.median(v)) for key, v in values.items()}
        for name, values in taken.items()
    }


def rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def random_access(data: Layout, seed: int) -> float:
    """Microseconds a sample, in random order."""
    order = np.random.default_rng(seed).permutation(len(data.lengths)).tolist()
    began = time.perf_counter()
    for index in order:
        data.sample(index)
    return (time.perf_counter() - began) / len(order) * 1e6


def collated(data: Layout, positions: Sequence[int]) -> Iterator[MicroBatch]:
    """A global batch as one rank's micro-batches."""
    (micro_batches,) = pack(data.lengths[list(positions)], TOKEN_BUDGET, num_ranks=1)
    for micro_batch in micro_batches:
        yield collate([data.sample(positions[index]) for index in micro_batch], "sequence_mean", Padding())


def loader(data: Layout, seed: int) -> float:
    """Tokens a second of collated micro-batches, over two global batches (or as many as there are)."""
    size = min(GLOBAL_BATCH, len(data.lengths))
    plan = BatchPlan(len(data.lengths), size, seed)
    began = time.perf_counter()
    tokens = sum(
        batch.num_tokens for step in range(2) for batch in collated(data, plan.samples(step).tolist())
    )
    return tokens / (time.perf_counter() - began)


def in_fresh_process(name: str, directory: Path) -> dict[str, float]:
    """`first_batch` in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(first_batch, (name, directory))


def first_batch(name: str, directory: Path) -> dict[str, float]:
    """Open, plan, pack, and collate one micro-batch."""
    collate([next(make(1, 1))], "sequence_mean", Padding())  # what torch sets up once is nobody's
    before = start_peak()
    began = time.perf_counter()
    data = LAYOUTS[name](directory)
    plan = BatchPlan(len(data.lengths), min(GLOBAL_BATCH, len(data.lengths)), seed=0)
    next(collated(data, plan.samples(0).tolist()))
    return {"first_batch_s": time.perf_counter() - began, "peak_mb": (peak() - before) / 1e6}


def start_peak() -> int:
    """Forget the highest resident set so far (Linux); returns the present one, bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return int(psutil.Process().memory_info().rss)


def peak() -> int:
    """The highest resident set since `start_peak`, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def measure_million(directory: Path, count: int) -> dict[str, float]:
    """A million samples of a few tokens: the index is as large as that of long ones."""
    tokens, log_probs = np.arange(24, dtype=np.int32), np.full(24, -1, dtype=np.float32)
    for number, start in enumerate(range(0, count, 16 * SHARD_SAMPLES)):
        names = [f"problem-{index}/0" for index in range(start, min(count, start + 16 * SHARD_SAMPLES))]
        rollouts = (Rollout(name, tokens[:4], tokens, "stop", log_probs) for name in names)
        write_shard(directory / shard_name(ROLLOUTS, number), ROLLOUTS, rollouts, PLAN)
        scores = (Score(name, log_probs) for name in names)
        write_shard(directory / shard_name(SCORES, number), SCORES, scores, PLAN)
    commit_shards(directory)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(plan_million, (directory,))


def plan_million(directory: Path) -> dict[str, float]:
    """Open, join and check everything, plan an epoch, pack one global batch over 8 ranks."""
    before = start_peak()
    began = time.perf_counter()
    data = TrainingData(directory, directory)
    data.require_within(TOKEN_BUDGET, Padding())
    data.require_vocabulary(VOCABULARY)
    opened = time.perf_counter() - began
    positions = BatchPlan(len(data), GLOBAL_BATCH, seed=0).samples(0)
    pack(data.lengths[positions], TOKEN_BUDGET, num_ranks=8)
    return {
        "samples": len(data),
        "open_and_join_s": rounded(opened),
        "planned_s": rounded(time.perf_counter() - began),
        "peak_mb": rounded((peak() - before) / 1e6),
    }


if __name__ == "__main__":
    main()
