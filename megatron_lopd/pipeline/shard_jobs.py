"""Sampling and scoring shard by shard: what generate, rollout, score and evaluate have in common.

Every sample has its own seed and its place in a shard is fixed: whoever makes a shard, and however many had
begun it before, the finished files are the same bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lopd.artifacts.committed import CommittedFile
from megatron_lopd.config import EngineConfig, Sampling, ScoreConfig
from megatron_lopd.data.dataset import listed_shards, match_scores, open_shards, shard_name
from megatron_lopd.data.records import Rollout, Score
from megatron_lopd.data.schemas import ROLLOUTS, scores_kind
from megatron_lopd.data.shard_kind import ShardKind
from megatron_lopd.data.shards import ShardReader, write_shard
from megatron_lopd.engines.protocol import Engine, Prompted
from megatron_lopd.errors import DataError
from megatron_lopd.pipeline.encoded import EncodedPrompts
from megatron_lopd.pipeline.resolved import Answering
from megatron_lopd.pipeline.stage import Output, Plan, identity_of
from megatron_lopd.pipeline.workers import Count, Part, Work
from megatron_lopd.prompts.prompt import Prompt
from megatron_lopd.runtime.display import say


@dataclass(frozen=True)
class SamplingJob:
    """Which model answers which prompts, and how.

    `stream` separates the seeds of different uses; `label` is what progress is shown under; `plan` is the
    digest of the stage's plan, which its shards carry. `only`: the sample ids to draw, where not every sample
    of the prompts is wanted.
    """

    model_dir: Path
    prompts: EncodedPrompts
    sampling: Sampling
    engine: EngineConfig
    seed: int
    stream: str
    label: str
    plan: str
    only: frozenset[str] | None = None


def sample_seed(seed: int, stream: str, sample_id: str) -> int:
    """A sample's own seed, in [0, 2^63): a digest, so neighbours in any of the three are unrelated."""
    digest = hashlib.sha256(f"{seed}\0{stream}\0{sample_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def sample_name(prompt: Prompt, index: int) -> str:
    """The id of the `index`-th response to a prompt."""
    return f"{prompt.id}/{index}"


def sample_names(prompts: Sequence[Prompt], sampling: Sampling) -> list[str]:
    """The ids of all responses to prompts, in order."""
    return [sample_name(prompt, index) for prompt in prompts for index in range(sampling.samples_per_prompt)]


def answering_job(part: Answering, plan: Plan) -> SamplingJob:
    """All that generate or rollout asks for."""
    return SamplingJob(
        model_dir=part.model.directory,
        prompts=part.encoded,
        sampling=part.config.sampling,
        engine=part.config.engine,
        seed=part.run.recipe.seed,
        stream=part.name,
        label=part.name,
        plan=identity_of(plan),
    )


def rollout_work(job: SamplingJob, directory: Path) -> Work:
    """Every response of `job`, as shards in `directory`."""

    def part(number: int, requests: Sequence[Prompted]) -> Part:
        def write(engine: Engine, path: Path, count: Count[Rollout]) -> None:
            answers = engine.generate(requests, job.sampling, job.prompts.end_tokens)
            write_shard(path, ROLLOUTS, count(answers), job.plan)

        return Part(directory / shard_name(ROLLOUTS, number), len(requests), write)

    chunks = _chunks(_requests(job), job.engine.shard_samples)
    parts = [part(number, requests) for number, requests in enumerate(chunks)]
    return Work(job.label, job.engine, job.model_dir, parts, job.plan)


def score_work(model_dir: Path, config: ScoreConfig, rollout_dir: Path, directory: Path, plan: str) -> Work:
    """A score of every rollout, in a shard in `directory` for each shard of rollouts, of the same number."""
    kind = scores_kind(config.top_k)
    files, made_by = listed_shards(ROLLOUTS, rollout_dir)

    def part(number: int, rollouts: CommittedFile) -> Part:
        reader = ShardReader(ROLLOUTS, [rollouts], plan=made_by)

        def write(engine: Engine, path: Path, count: Count[Score]) -> None:
            write_shard(path, kind, count(engine.score([*reader], config.top_k)), plan)

        return Part(directory / shard_name(kind, number), len(reader), write)

    parts = [part(number, file) for number, file in enumerate(files)]
    return Work("score", config.engine, model_dir, parts, plan)


def score_output(top_k: int, rollout_dir: Path, directory: Path, plan: str) -> Output:
    """What a score stage commits: a shard for each of the rollouts'.

    DataError unless every rollout has its score, whole, of the right length and of this plan.
    """
    rollouts, kind = open_shards(ROLLOUTS, rollout_dir), scores_kind(top_k)
    names = shard_names(kind, len(listed_shards(ROLLOUTS, rollout_dir)[0]), 1)
    scores = ShardReader(kind, [directory / name for name in names], plan=plan)
    scores.require_whole()
    match_scores(rollouts, scores)
    responses = int(rollouts.lengths("response_tokens").sum())
    tokens = responses + int(rollouts.lengths("prompt_tokens").sum())
    return Output(names, {"samples": len(scores), "response_tokens": responses, "tokens": tokens})


def rollout_output(job: SamplingJob, directory: Path) -> Output:
    """What a stage of nothing but `job` commits: shards of just what it asks for, whole and of its plan.

    Raises DataError as `finished_rollouts`, and for a prompt that is another now.
    """
    requests, size = _requests(job), job.engine.shard_samples
    reader = finished_rollouts(directory, [each.sample_id for each in requests], size, job.plan)
    for index, asked in enumerate(requests):
        if not np.array_equal(reader.record(index).prompt_tokens, asked.prompt_tokens):
            raise DataError(
                f"{reader.path(index)}: sample {asked.sample_id} answers another prompt than it is now: "
                "the prompts, the chat template or what it prints have changed: "
                f"remove {directory} to make it again"
            )
    return Output(shard_names(ROLLOUTS, len(requests), size), count_rollouts(reader))


def finished_rollouts(
    directory: Path, ids: Sequence[str], shard_samples: int, plan: str
) -> ShardReader[Rollout]:
    """The shards of the samples `ids`, made in `directory` by `plan` and not yet committed.

    DataError naming the first that is not whole, of another plan, or not of just those samples.
    """
    files = [directory / name for name in shard_names(ROLLOUTS, len(ids), shard_samples)]
    reader = ShardReader(ROLLOUTS, files, plan=plan)
    there = (reader.sample_ids[index] for index in range(len(reader)))
    for index, (found, asked) in enumerate(zip_longest(there, ids, fillvalue="none")):
        if found != asked:
            raise DataError(
                f"{reader.path(min(index, len(reader) - 1))}: sample {index} is {found}, and {asked} was "
                f"asked for there: remove {directory} to make it again"
            )
    return reader


def shard_names(kind: ShardKind[Any], samples: int, shard_samples: int) -> list[str]:
    """The files that so many samples make."""
    return [shard_name(kind, number) for number in range(math.ceil(samples / shard_samples))]


def count_rollouts(reader: ShardReader[Rollout]) -> dict[str, int]:
    """What rollouts hold: samples, tokens, and how many were cut at the horizon."""
    prompt, response = reader.lengths("prompt_tokens"), reader.lengths("response_tokens")
    return {
        "samples": len(reader),
        "prompt_tokens": int(prompt.sum()),
        "response_tokens": int(response.sum()),
        "tokens": int(prompt.sum() + response.sum()),
        "cut_at_horizon": int(reader.matches("finish_reason", "length").sum()),
    }


def say_cut(label: str, counts: Mapping[str, int], section: str, sampling: Sampling) -> None:
    """Print what share of the answers of `counts` was cut at the horizon, and what to set; or nothing."""
    cut, samples, horizon = counts["cut_at_horizon"], counts["samples"], sampling.max_new_tokens
    if cut:
        say(
            f"lopd: {label}: {cut:,} of {samples:,} answers ({100 * cut / samples:.1f} %) were cut at the "
            f"horizon of {horizon:,} tokens: raise {section}.sampling.max_new_tokens to let them end"
        )


def _requests(job: SamplingJob) -> list[Prompted]:
    requests = []
    for prompt, tokens in zip(job.prompts.prompts, job.prompts.tokens, strict=True):
        for index in range(job.sampling.samples_per_prompt):
            sample_id = sample_name(prompt, index)
            if job.only is None or sample_id in job.only:
                seed = sample_seed(job.seed, job.stream, sample_id)
                requests.append(Prompted(sample_id, tokens, seed))
    return requests


def _chunks(requests: Sequence[Prompted], size: int) -> Iterator[Sequence[Prompted]]:
    for start in range(0, len(requests), size):
        yield requests[start : start + size]
