"""How good a model's answers are: avg@k, pass@k, the majority's vote, greedy, entropy and length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_lopd.config import EvaluateConfig
from megatron_lopd.data.dataset import open_shards
from megatron_lopd.data.schemas import ROLLOUTS
from megatron_lopd.evaluation.estimates import Estimate, estimate, ks_of, majority, pass_at_k, percent
from megatron_lopd.evaluation.verdicts import Marker
from megatron_lopd.graders import Grader, Verdict, open_grader
from megatron_lopd.pipeline.encoded import encode, longest_prompt
from megatron_lopd.pipeline.resolved import ResolvedRun
from megatron_lopd.pipeline.shard_jobs import SamplingJob, rollout_work
from megatron_lopd.pipeline.workers import Work, make_parts
from megatron_lopd.prompts.prompt import Prompt
from megatron_lopd.runtime.claim_files import remove_claims


@dataclass(frozen=True)
class Grades:
    """Of `n` prompts. Shares are in [0, 1]; a response cut at the horizon counts as wrong.

    `sampled`: avg@k, the mean over prompts of the share of its `k` samples that are right; `greedy`: share of
    the likeliest responses that are right; their errors are standard errors over prompts, None of one prompt.
    `pass_at_k`: of prompts with a right one among their `k` samples; `pass_at`: pass@1, 2, 4, ... k without
    bias. `majority`: maj@k, of prompts whose commonest answer is right; None where the grader extracts none.
    `entropy`: nats a token, the mean of `-log pi(a_t | s_t)` over the sampled tokens, which estimates the
    sampler's entropy where it samples. `length`: tokens a sampled response, end token included. `cut`: share
    of sampled responses that were cut at the horizon. `ungraded`: responses, sampled and greedy, that the
    grader failed at; they count as wrong.
    """

    n: int
    sampled: float
    sampled_error: float | None
    greedy: float
    greedy_error: float | None
    k: int
    pass_at_k: float
    pass_at: dict[int, Estimate]
    majority: Estimate | None
    entropy: float
    length: float
    cut: float
    ungraded: int

    def __str__(self) -> str:
        """In a line, in percent."""
        best = self.pass_at[self.k]
        measures = {
            f"avg@{self.k}": percent(self.sampled, self.sampled_error),
            **({} if self.k == 1 else {f"pass@{self.k}": percent(best.share, best.error)}),
            "greedy": percent(self.greedy, self.greedy_error),
        }
        text = ", ".join(f"{name} {value} %" for name, value in measures.items())
        return f"{text} of {self.n:,} prompts" + (f"; {self.ungraded:,} ungraded" if self.ungraded else "")


def check_sets(run: ResolvedRun) -> dict[str, list[Prompt]]:
    """The prompts of each set to evaluate on. Raises when one of them could not be graded."""
    with open_grader(run.recipe.evaluate.grader) as grader:
        sets = {name: each.prompts for name, each in run.evaluation_sets.items()}
        for prompts in sets.values():
            grader.require(prompts)
    return sets


def answering(
    model_dir: Path,
    prompts: Sequence[Prompt],
    settings: EvaluateConfig,
    seed: int,
    directory: Path,
    label: str,
) -> Iterator[Work]:
    """The work of answering every prompt, into `directory`/sampled and /greedy, and of grading the answers.

    Every model is given the same draws, to be compared on equal luck.
    """
    greedy = replace(settings.sampling, temperature=0.0, samples_per_prompt=1)
    limit = longest_prompt(model_dir, settings.sampling, None)
    encoded = encode(prompts, model_dir, limit, settings.engine.trust_remote_code)
    marker = Marker(prompts, model_dir, settings.engine.trust_remote_code)
    for mode, sampling in (("sampled", settings.sampling), ("greedy", greedy)):
        job = SamplingJob(
            model_dir=model_dir,
            prompts=encoded,
            sampling=sampling,
            engine=settings.engine,
            seed=seed,
            stream=f"evaluate {mode}",
            label=f"evaluate {label} {mode}",
        )
        yield _with_grading(rollout_work(job, directory / mode), marker, settings.grader)


def _with_grading(work: Work, marker: Marker, grader: str) -> Work:
    """The same work, where each shard is graded too once it is there."""
    graded = [marker.part(part.path, grader, work.directory) for part in work.parts]
    return replace(work, parts=[each for pair in zip(work.parts, graded, strict=True) for each in pair])


def grade_model(
    model_dir: Path,
    prompts: Sequence[Prompt],
    settings: EvaluateConfig,
    seed: int,
    directory: Path,
    label: str,
    grader: Grader,
) -> Grades:
    """Answer every prompt into `directory`, and grade what comes out."""
    make_parts(list(answering(model_dir, prompts, settings, seed, directory, label)))
    grades = grade_answers(directory, model_dir, prompts, settings, grader)
    remove_claims(directory)
    return grades


def grade_answers(
    directory: Path, model_dir: Path, prompts: Sequence[Prompt], settings: EvaluateConfig, grader: Grader
) -> Grades:
    """The grades of what `answering` left in `directory`."""
    trust = settings.engine.trust_remote_code
    return _grades(
        directory,
        graded(directory / "sampled", model_dir, prompts, grader, trust),
        graded(directory / "greedy", model_dir, prompts, grader, trust),
    )


def share_right(
    directory: Path, voice_dir: Path, prompts: Sequence[Prompt], settings: EvaluateConfig, grader: Grader
) -> float:
    """The share of the responses in a directory of rollouts that are right, in [0, 1]."""
    verdicts = graded(directory, voice_dir, prompts, grader, settings.engine.trust_remote_code)
    return float(np.mean([verdict.right for of_prompt in verdicts.values() for verdict in of_prompt]))


def graded(
    directory: Path, voice_dir: Path, prompts: Sequence[Prompt], grader: Grader, trust_remote_code: bool
) -> dict[str, list[Verdict]]:
    """The grader's verdict on each response to each prompt in a directory of rollouts, by prompt id.

    Those that workers have kept beside their claims are taken as they are. `voice_dir` has the tokenizer that
    turns responses into text.
    """
    return Marker(prompts, voice_dir, trust_remote_code).by_prompt(directory, grader, directory)


def _grades(directory: Path, sampled: dict[str, list[Verdict]], greedy: dict[str, list[Verdict]]) -> Grades:
    responses = open_shards(ROLLOUTS, directory / "sampled")
    log_probs = [record.log_probs for record in responses if record.log_probs is not None]
    right = [[verdict.right for verdict in of_prompt] for of_prompt in sampled.values()]
    k = len(right[0])
    average = estimate([float(np.mean(each)) for each in right])
    likeliest = estimate([of_prompt[0].right for of_prompt in greedy.values()])
    return Grades(
        n=len(right),
        sampled=average.share,
        sampled_error=average.error,
        greedy=likeliest.share,
        greedy_error=likeliest.error,
        k=k,
        pass_at_k=float(np.mean([any(each) for each in right])),
        pass_at={fewer: estimate([pass_at_k(k, sum(each), fewer) for each in right]) for fewer in ks_of(k)},
        majority=_majority(list(sampled.values())),
        entropy=float(-np.concatenate(log_probs).astype(np.float64).mean()),
        length=float(responses.lengths("response_tokens").mean()),
        cut=float(np.mean([record.finish_reason == "length" for record in responses])),
        ungraded=sum(v.ungraded for each in (*sampled.values(), *greedy.values()) for v in each),
    )


def _majority(verdicts: Sequence[Sequence[Verdict]]) -> Estimate | None:
    votes = [[(verdict.answer, verdict.right) for verdict in of_prompt] for of_prompt in verdicts]
    if not any(answer is not None for of_prompt in votes for answer, _ in of_prompt):
        return None
    return estimate([majority(of_prompt) for of_prompt in votes])
