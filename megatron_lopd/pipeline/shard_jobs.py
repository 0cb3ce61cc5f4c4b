"""Sampling and scoring shard by shard: what generate, rollout, score and evaluate have in common.

Every sample has its own seed and its place in a shard is fixed: whoever makes a shard, and however many had
begun it before, the finished files are the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lopd.artifacts.manifest import Manifest
from megatron_lopd.config import EngineConfig, Sampling, ScoreConfig
from megatron_lopd.data.dataset import TrainingData, open_shards, shard_name
from megatron_lopd.data.records import Rollout, Score
from megatron_lopd.data.schemas import ROLLOUTS, scores_kind
from megatron_lopd.data.shards import ShardReader, write_shard
from megatron_lopd.engines.protocol import Engine, Prompted
from megatron_lopd.pipeline.encoded import EncodedPrompts
from megatron_lopd.pipeline.resolved import Answering
from megatron_lopd.pipeline.stage import Output
from megatron_lopd.pipeline.workers import Count, Part, Work
from megatron_lopd.prompts.prompt import Prompt


@dataclass(frozen=True)
class SamplingJob:
    """Which model answers which prompts, and how.

    `stream` separates the seeds of different uses; `label` is what progress is shown under. `only`: the
    sample ids to draw, where not every sample of the prompts is wanted.
    """

    model_dir: Path
    prompts: EncodedPrompts
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


def answering_job(part: Answering) -> SamplingJob:
    """All that generate or rollout asks for."""
    return SamplingJob(
        model_dir=part.model.directory,
        prompts=part.encoded,
        sampling=part.config.sampling,
        engine=part.config.engine,
        seed=part.run.recipe.seed,
        stream=part.name,
        label=part.name,
    )


def rollout_work(job: SamplingJob, directory: Path) -> Work:
    """Every response of `job`, as shards in `directory`."""

    def part(number: int, requests: Sequence[Prompted]) -> Part:
        def write(engine: Engine, path: Path, count: Count[Rollout]) -> None:
            write_shard(
                path, ROLLOUTS, count(engine.generate(requests, job.sampling, job.prompts.end_tokens))
            )

        return Part(directory / shard_name(ROLLOUTS, number), len(requests), write)

    chunks = _chunks(_requests(job), job.engine.shard_samples)
    parts = [part(number, requests) for number, requests in enumerate(chunks)]
    return Work(job.label, job.engine, job.model_dir, parts)


def score_work(
    model_dir: Path, config: ScoreConfig, rollout_dir: Path, rollout_files: Sequence[str], directory: Path
) -> Work:
    """A score of every rollout, in a shard in `directory` for each shard of rollouts, of the same number."""
    kind = scores_kind(config.top_k)

    def part(number: int, rollouts: Path) -> Part:
        reader = ShardReader(ROLLOUTS, [rollouts])

        def write(engine: Engine, path: Path, count: Count[Score]) -> None:
            write_shard(path, kind, count(engine.score([*reader], config.top_k)))

        return Part(directory / shard_name(kind, number), len(reader), write)

    names = sorted(name for name in rollout_files if name.endswith(".arrow"))
    parts = [part(number, rollout_dir / name) for number, name in enumerate(names)]
    return Work("score", config.engine, model_dir, parts)


def score_output(rollout: Manifest, rollout_dir: Path, directory: Path) -> Output:
    """What a score stage commits. DataError unless every rollout has its score, of the right length."""
    TrainingData(rollout_dir, directory)
    counts = {name: rollout.counts[name] for name in ("samples", "response_tokens", "tokens")}
    return Output(shards_in(directory), counts)


def shards_in(directory: Path) -> list[str]:
    """The names of the shards in a directory, in order."""
    return sorted(path.name for path in directory.glob("*.arrow"))


def count_rollouts(directory: Path) -> dict[str, int]:
    """What a directory of rollouts holds: samples, tokens, and how many were cut at the horizon."""
    reader = open_shards(ROLLOUTS, directory)
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
        print(
            f"lopd: {label}: {cut:,} of {samples:,} answers ({100 * cut / samples:.1f} %) were cut at the "
            f"horizon of {horizon:,} tokens: raise {section}.sampling.max_new_tokens to let them end",
            flush=True,
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
