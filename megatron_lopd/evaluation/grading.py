"""How good a model's answers are: avg@k, pass@k, the majority's vote, greedy, entropy and length."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lopd.artifacts.manifest import require_listed
from megatron_lopd.config import EvaluateConfig, Sampling
from megatron_lopd.data.dataset import listed_shards, open_shards
from megatron_lopd.data.records import Rollout
from megatron_lopd.data.schemas import ROLLOUTS
from megatron_lopd.data.shards import ShardReader
from megatron_lopd.evaluation.answers import ANSWERS, MODES, write_answers
from megatron_lopd.evaluation.estimates import Estimate, estimate, ks_of, majority, pass_at_k, percent
from megatron_lopd.evaluation.verdicts import Marker
from megatron_lopd.graders import Grader, Verdict
from megatron_lopd.pipeline.encoded import EncodedPrompts, encode, longest_prompt
from megatron_lopd.pipeline.shard_jobs import SamplingJob, finished_rollouts, rollout_work, sample_names
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
    grader failed at; they count as wrong. `late`: those of them that it had no time for.
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
    late: int

    def plain(self) -> dict[str, Any]:
        """For JSON; `late` only where any was."""
        return {name: value for name, value in asdict(self).items() if name != "late" or value}

    def __str__(self) -> str:
        """In a line, in percent."""
        best = self.pass_at[self.k]
        measures = {
            f"avg@{self.k}": percent(self.sampled, self.sampled_error),
            **({} if self.k == 1 else {f"pass@{self.k}": percent(best.share, best.error)}),
            "greedy": percent(self.greedy, self.greedy_error),
        }
        text = ", ".join(f"{name} {value} %" for name, value in measures.items())
        ungraded = f"; {self.ungraded:,} ungraded, taken for wrong" if self.ungraded else ""
        late = f", {self.late:,} of them for want of time (evaluate.grading_minutes)" if self.late else ""
        return f"{text} of {self.n:,} prompts{ungraded}{late}"


def answering(
    model_dir: Path,
    prompts: EncodedPrompts,
    settings: EvaluateConfig,
    seed: int,
    directory: Path,
    label: str,
    plan: str,
) -> Iterator[Work]:
    """The work of answering every prompt, into `directory`/sampled and /greedy, and of grading the answers.

    Every model is given the same draws, to be compared on equal luck.
    """
    marker = _marker(prompts.prompts, model_dir, settings, _responses(prompts.prompts, settings))
    for mode, sampling in _modes(settings).items():
        job = SamplingJob(
            model_dir=model_dir,
            prompts=prompts,
            sampling=sampling,
            engine=settings.engine,
            seed=seed,
            stream=f"evaluate {mode}",
            label=f"evaluate {label} {mode}",
            plan=plan,
        )
        yield _with_grading(rollout_work(job, directory / mode), marker, settings.grader)


def _modes(settings: EvaluateConfig) -> dict[str, Sampling]:
    greedy = replace(settings.sampling, temperature=0.0, samples_per_prompt=1)
    return {"sampled": settings.sampling, "greedy": greedy}


def answers_in(
    directory: Path, prompts: Sequence[Prompt], settings: EvaluateConfig, plan: str
) -> dict[str, ShardReader[Rollout]]:
    """What `answering` left in `directory`, by "sampled" and "greedy". Raises as `finished_rollouts`."""
    size = settings.engine.shard_samples
    return {
        mode: finished_rollouts(directory / mode, sample_names(prompts, sampling), size, plan)
        for mode, sampling in _modes(settings).items()
    }


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
    plan: str,
) -> tuple[Grades, list[Path]]:
    """Answer every prompt into `directory`, and grade what comes out: that, and the files."""
    limit = longest_prompt(model_dir, settings.sampling, None, "evaluate")
    encoded = encode(prompts, model_dir, limit, settings.engine.trust_remote_code)
    make_parts(list(answering(model_dir, encoded, settings, seed, directory, label, plan)))
    answers = answers_in(directory, prompts, settings, plan)
    grades, _ = grade_answers(answers, directory, model_dir, prompts, settings, grader)
    remove_claims(directory)
    return grades, [directory / ANSWERS, *(path for reader in answers.values() for path in reader.paths)]


def grade_answers(
    answers: Mapping[str, ShardReader[Rollout]],
    directory: Path,
    model_dir: Path,
    prompts: Sequence[Prompt],
    settings: EvaluateConfig,
    grader: Grader,
) -> tuple[Grades, list[float]]:
    """The grades of `answers_in`, which are also written to `directory` as text for people.

    Verdicts that were kept are taken, others made. And of each prompt, in order, the share of its samples
    that are right.
    """
    marker = _marker(prompts, model_dir, settings, _responses(prompts, settings))
    verdicts = {mode: marker.by_prompt(answers[mode].paths, grader, directory / mode) for mode in MODES}
    write_answers(directory, answers, marker.text, prompts, verdicts)
    shares = [float(np.mean([each.right for each in verdicts["sampled"][prompt.id]])) for prompt in prompts]
    return _grades(answers["sampled"], verdicts["sampled"], verdicts["greedy"]), shares


def grading_of(rollouts: Path, prompts: Sequence[Prompt], settings: EvaluateConfig, directory: Path) -> Work:
    """The work of grading an artifact of rollouts, with its tokenizer; verdicts are kept in `directory`."""
    shards, _ = listed_shards(ROLLOUTS, rollouts)
    marker = _marker_of(rollouts, prompts, settings)
    parts = [marker.part(shard, settings.grader, directory) for shard in shards]
    return Work(f"grade {rollouts.name}", None, rollouts / "tokenizer", parts)


def verdicts_on(
    rollouts: Path, prompts: Sequence[Prompt], settings: EvaluateConfig, grader: Grader, directory: Path
) -> list[Verdict]:
    """On each response, after `grading_of` into `directory`."""
    shards, _ = listed_shards(ROLLOUTS, rollouts)
    verdicts = _marker_of(rollouts, prompts, settings).by_prompt(shards, grader, directory)
    return [verdict for each in verdicts.values() for verdict in each]


def _responses(prompts: Sequence[Prompt], settings: EvaluateConfig) -> int:
    """How many `answering` asks for, sampled and greedy."""
    return len(prompts) * (settings.sampling.samples_per_prompt + 1)


def _marker(prompts: Sequence[Prompt], voice_dir: Path, settings: EvaluateConfig, responses: int) -> Marker:
    """What grades so many responses within the recipe's time for them together."""
    seconds = 60 * settings.grading_minutes
    return Marker(prompts, voice_dir, settings.engine.trust_remote_code, seconds / max(responses, 1))


def _marker_of(rollouts: Path, prompts: Sequence[Prompt], settings: EvaluateConfig) -> Marker:
    """As `_marker`, for an artifact of rollouts, with its tokenizer."""
    require_listed(rollouts / "tokenizer")
    return _marker(prompts, rollouts / "tokenizer", settings, len(open_shards(ROLLOUTS, rollouts)))


def _grades(
    responses: ShardReader[Rollout], sampled: dict[str, list[Verdict]], greedy: dict[str, list[Verdict]]
) -> Grades:
    # One at a time in memory: there may be a thousand million.
    nats = math.fsum(
        float(-record.log_probs.sum(dtype=np.float64)) for record in responses if record.log_probs is not None
    )
    right = [[verdict.right for verdict in of_prompt] for of_prompt in sampled.values()]
    verdicts = [verdict for each in (*sampled.values(), *greedy.values()) for verdict in each]
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
        entropy=nats / int(responses.lengths("log_probs").sum()),
        length=float(responses.lengths("response_tokens").mean()),
        cut=float(responses.matches("finish_reason", "length").mean()),
        ungraded=sum(v.ungraded for v in verdicts),
        late=sum(v.late for v in verdicts),
    )


def _majority(verdicts: Sequence[Sequence[Verdict]]) -> Estimate | None:
    votes = [[(verdict.answer, verdict.right) for verdict in of_prompt] for of_prompt in verdicts]
    if not any(answer is not None for of_prompt in votes for answer, _ in of_prompt):
        return None
    return estimate([majority(of_prompt) for of_prompt in votes])
