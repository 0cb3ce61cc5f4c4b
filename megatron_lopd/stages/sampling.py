"""Sampling and scoring shard by shard: what generate, rollout, score and evaluate have in common.

A shard is committed when it is whole; a killed process loses at most the shard it was in, and since
every sample has its own seed and its place in a shard is fixed, the finished files are the same bytes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_lopd.config import EngineConfig, Sampling, ScoreConfig
from megatron_lopd.data.chat import Chat
from megatron_lopd.data.dataset import open_shards, shard_name
from megatron_lopd.data.prompts import Prompt
from megatron_lopd.data.records import Rollout, Score
from megatron_lopd.data.schemas import ROLLOUTS, scores_kind
from megatron_lopd.data.shards import ShardReader, write_shard
from megatron_lopd.engines import open_engine
from megatron_lopd.engines.protocol import Engine, GenerateRequest, ScoreRequest
from megatron_lopd.training.progress import ProgressDisplay

R = TypeVar("R", Rollout, Score)


@dataclass(frozen=True)
class SamplingJob:
    """Which model answers which prompts, and how.

    `stream` separates the seeds of different uses; `label` is what progress is shown under.
    `max_prompt_tokens`: a longer prompt is an error that names it. `only`: the sample ids to draw, where not
    every sample of the prompts is wanted.
    """

    model_dir: Path
    prompts: Sequence[Prompt]
    max_prompt_tokens: int
    sampling: Sampling
    engine: EngineConfig
    seed: int
    stream: str
    label: str
    only: frozenset[str] | None = None


def sample_seed(seed: int, stream: str, sample_id: str) -> int:
    """A sample's own seed, in [0, 2^63): a digest, so neighbours in any of the three are unrelated."""
    digest = hashlib.sha256(f"{seed}\0{stream}\0{sample_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def sample_name(prompt: Prompt, index: int) -> str:
    """The id of the `index`-th response to a prompt."""
    return f"{prompt.id}/{index}"


def write_rollouts(job: SamplingJob, directory: Path) -> list[str]:
    """Sample every response of `job` into shards in `directory`; those already there are kept.

    Returns the shards' names. Raises DataError for a prompt that cannot be encoded, EngineError for
    a model the engine cannot run.
    """
    chat = Chat(str(job.model_dir), job.engine.trust_remote_code)
    requests = _requests(job, chat)
    chunks = list(_chunks(requests, job.engine.shard_samples))
    names = [shard_name(ROLLOUTS, number) for number in range(len(chunks))]
    missing = [number for number, name in enumerate(names) if not (directory / name).is_file()]
    if missing:
        engine = open_engine(job.engine, str(job.model_dir))
        progress = _Progress(job.label, len(requests), sum(len(chunks[number]) for number in missing))
        for number in missing:
            records = _sample(engine, chunks[number], job.sampling, chat.end_tokens)
            write_shard(directory / names[number], ROLLOUTS, progress.count(records))
        progress.close()
    return names


def write_scores(
    model_dir: Path, config: ScoreConfig, rollout_dir: Path, rollout_files: Sequence[str], directory: Path
) -> list[str]:
    """Score every rollout shard into a score shard of the same number; those already there are kept."""
    kind = scores_kind(config.top_k)
    rollout_names = sorted(name for name in rollout_files if name.endswith(".arrow"))
    names = [shard_name(kind, number) for number in range(len(rollout_names))]
    missing = [number for number, name in enumerate(names) if not (directory / name).is_file()]
    if missing:
        readers = {number: ShardReader(ROLLOUTS, [rollout_dir / rollout_names[number]]) for number in missing}
        total = sum(len(reader) for reader in readers.values())
        with closing(open_engine(config.engine, str(model_dir))) as engine:
            progress = _Progress("score", total, total)
            for number in missing:
                requests = score_requests(readers[number])
                scores = engine.score(requests, config.top_k)
                write_shard(directory / names[number], kind, progress.count(scores))
            progress.close()
    return names


def score_requests(rollouts: Iterable[Rollout]) -> list[ScoreRequest]:
    """What is asked of an engine that scores them."""
    return [ScoreRequest(each.sample_id, each.prompt_tokens, each.response_tokens) for each in rollouts]


def count_rollouts(directory: Path) -> dict[str, int]:
    """What a directory of rollouts holds: samples, tokens, and how many were cut at the horizon."""
    reader = open_shards(ROLLOUTS, directory)
    prompt, response = reader.lengths("prompt_tokens"), reader.lengths("response_tokens")
    return {
        "samples": len(reader),
        "prompt_tokens": int(prompt.sum()),
        "response_tokens": int(response.sum()),
        "tokens": int(prompt.sum() + response.sum()),
        "cut_at_horizon": sum(record.finish_reason == "length" for record in reader),
    }


class _Progress:
    """Counts records as they pass into a shard."""

    def __init__(self, label: str, total: int, missing: int) -> None:
        self._done = total - missing
        self._tokens = 0
        self._began = time.monotonic()
        self._display = ProgressDisplay(label, "sample")
        self._display.begin(self._done, total)

    def count(self, records: Iterable[R]) -> Iterator[R]:
        for record in records:
            self._done += 1
            self._tokens += 0 if record.log_probs is None else len(record.log_probs)
            rate = self._tokens / (time.monotonic() - self._began)
            self._display.update(self._done, f"{rate:,.0f} tokens/s")
            yield record

    def close(self) -> None:
        self._display.close()


def encode_prompts(prompts: Sequence[Prompt], chat: Chat, max_tokens: int) -> list[NDArray[np.int32]]:
    """Token ids of each prompt, int32 [P]. DataError naming the first that does not fit `max_tokens`."""
    return [chat.prompt(prompt.messages, f"prompt {prompt.id}", max_tokens) for prompt in prompts]


def _requests(job: SamplingJob, chat: Chat) -> list[GenerateRequest]:
    requests = []
    encoded = encode_prompts(job.prompts, chat, job.max_prompt_tokens)
    for prompt, tokens in zip(job.prompts, encoded, strict=True):
        for index in range(job.sampling.samples_per_prompt):
            sample_id = sample_name(prompt, index)
            if job.only is None or sample_id in job.only:
                seed = sample_seed(job.seed, job.stream, sample_id)
                requests.append(GenerateRequest(sample_id, tokens, seed))
    return requests


def _sample(
    engine: Engine, requests: Sequence[GenerateRequest], sampling: Sampling, stop: frozenset[int]
) -> Iterator[Rollout]:
    for request, done in zip(requests, engine.generate(requests, sampling, stop), strict=True):
        yield Rollout(
            request.sample_id, request.prompt_tokens, done.response_tokens, done.finish_reason, done.log_probs
        )


def _chunks(requests: Sequence[GenerateRequest], size: int) -> Iterator[Sequence[GenerateRequest]]:
    for start in range(0, len(requests), size):
        yield requests[start : start + size]
