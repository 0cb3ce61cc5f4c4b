"""How good a model's answers are: sampled and greedy accuracy, pass@k, entropy and length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_lopd.config import EvaluateConfig
from megatron_lopd.data.chat import Chat
from megatron_lopd.data.dataset import open_shards
from megatron_lopd.data.prompts import Prompt
from megatron_lopd.data.schemas import ROLLOUTS
from megatron_lopd.stages import inputs
from megatron_lopd.stages.sampling import SamplingJob, write_rollouts
from megatron_lopd.tasks.prompts import grader


@dataclass(frozen=True)
class Grades:
    """Of `n` prompts. Shares are in [0, 1]; a response cut at the horizon counts as wrong.

    `sampled`: share of sampled responses that are right; `pass_at_k`: of prompts with a right one among
    their `k` samples; `greedy`: of the likeliest responses. `entropy`: nats a token, the mean of
    `-log pi(a_t | s_t)` over the sampled tokens, which estimates the sampler's entropy where it samples.
    `length`: tokens a sampled response, end token included.
    """

    n: int
    sampled: float
    greedy: float
    k: int
    pass_at_k: float
    entropy: float
    length: float


def grade_model(
    model_dir: Path,
    prompts: Sequence[Prompt],
    settings: EvaluateConfig,
    seed: int,
    directory: Path,
    label: str,
) -> Grades:
    """Sample every prompt into `directory`/sampled and /greedy and grade what comes out.

    Shards already there are kept. Every model is given the same draws, to be compared on equal luck.
    """
    greedy = replace(settings.sampling, temperature=0.0, samples_per_prompt=1)
    for mode, sampling in (("sampled", settings.sampling), ("greedy", greedy)):
        job = SamplingJob(
            model_dir=model_dir,
            prompts=prompts,
            max_prompt_tokens=inputs.longest_prompt(model_dir, sampling, None),
            sampling=sampling,
            engine=settings.engine,
            seed=seed,
            stream=f"evaluate {mode}",
            label=f"evaluate {label} {mode}",
        )
        write_rollouts(job, directory / mode)
    right = graded(directory / "sampled", model_dir, prompts, settings)
    responses = open_shards(ROLLOUTS, directory / "sampled")
    log_probs = [record.log_probs for record in responses if record.log_probs is not None]
    return Grades(
        n=len(prompts),
        sampled=_share(right),
        greedy=_share(graded(directory / "greedy", model_dir, prompts, settings)),
        k=settings.sampling.samples_per_prompt,
        pass_at_k=float(np.mean([any(answers) for answers in right.values()])),
        entropy=float(-np.concatenate(log_probs).astype(np.float64).mean()),
        length=float(responses.lengths("response_tokens").mean()),
    )


def share_right(
    directory: Path, voice_dir: Path, prompts: Sequence[Prompt], settings: EvaluateConfig
) -> float:
    """The share of the responses in a directory of rollouts that are right, in [0, 1]."""
    return _share(graded(directory, voice_dir, prompts, settings))


def graded(
    directory: Path, voice_dir: Path, prompts: Sequence[Prompt], settings: EvaluateConfig
) -> dict[str, list[bool]]:
    """Right or wrong, for each response to each prompt in a directory of rollouts.

    `voice_dir` has the tokenizer that turns them into text.
    """
    by_id = {prompt.id: prompt for prompt in prompts}
    is_right = grader(settings.grader)
    chat = Chat(str(voice_dir), settings.engine.trust_remote_code)
    right: dict[str, list[bool]] = defaultdict(list)
    for rollout in open_shards(ROLLOUTS, directory):
        prompt = by_id[rollout.sample_id.rpartition("/")[0]]
        ended = rollout.finish_reason == "stop"
        right[prompt.id].append(ended and is_right(prompt, chat.decode(rollout.response_tokens)))
    return right


def _share(right: dict[str, list[bool]]) -> float:
    answers = [answer for of_prompt in right.values() for answer in of_prompt]
    return sum(answers) / len(answers)
