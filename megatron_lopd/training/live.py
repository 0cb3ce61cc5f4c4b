"""Standard on-policy distillation: every step the current student samples, and a live teacher scores."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_lopd.config import EngineConfig, Sampling, ScoreConfig
from megatron_lopd.convert.gather import WeightGatherer
from megatron_lopd.data.batch_plan import BatchPlan, PlanPart
from megatron_lopd.data.collate import MicroBatch
from megatron_lopd.data.packing import Padding
from megatron_lopd.data.records import Sample, Score
from megatron_lopd.engines import kind_of, open_engine
from megatron_lopd.engines.process import EngineProcess
from megatron_lopd.engines.protocol import Engine, Prompted
from megatron_lopd.engines.requests import give_back_memory
from megatron_lopd.errors import DataError, EngineDied, EngineError
from megatron_lopd.mcore.loader import ListedSamples
from megatron_lopd.training.data_sources import ready
from megatron_lopd.training.preflight import LIVE_CAUSES, check_rollouts

if TYPE_CHECKING:
    from megatron_lopd.training.trainer import Trainer


@dataclass(frozen=True)
class Question:
    """A position of the data: a prompt, int32 [P], once for each response it gets in an epoch."""

    sample_id: str
    prompt_tokens: NDArray[np.int32]


@dataclass(frozen=True)
class LiveData:
    """What takes the place of cached rollouts and scores.

    `seed_of(step, sample_id, repeat)` is a sample's own seed; `repeat` counts earlier samples of the same
    position in the same global batch. `student_dir` gives the sampler its shape and settings; its weights
    are replaced before the first token is drawn.
    """

    questions: Sequence[Question]
    sampling: Sampling
    end_tokens: frozenset[int]
    seed_of: Callable[[int, str, int], int]
    student_dir: Path
    engine: EngineConfig
    teacher_dir: Path
    score: ScoreConfig
    is_alone: ClassVar[bool] = False

    def prepare(self, trainer: Trainer, part: PlanPart, steps_done: int) -> None:
        """Nothing: there are no samples yet. See LiveBatches.check."""

    def batches(self, trainer: Trainer, part: PlanPart, first_step: int) -> LiveBatches:
        """Any step of `part`, when it is asked for."""
        return LiveBatches(self, trainer, part.plan)

    def __len__(self) -> int:
        return len(self.questions)

    def require_within(self, token_budget: int, padding: Padding) -> None:
        """Raise DataError when prompt and response together, padded, can be above `token_budget` tokens."""
        longest = max(self.questions, key=lambda question: len(question.prompt_tokens))
        tokens = len(longest.prompt_tokens) + self.sampling.max_new_tokens
        needed = padding.least_budget(tokens)
        if needed > token_budget:
            raise DataError(
                f"sample {longest.sample_id} can have {tokens} tokens, which this layout pads to {needed}, "
                f"above micro_batch_tokens={token_budget}: raise it to at least {needed}, or lower "
                "rollout.sampling.max_new_tokens"
            )

    def require_positions(self, positions: int) -> None:
        """Raise DataError when prompt and response together can have more tokens than `positions`."""
        longest = max(self.questions, key=lambda question: len(question.prompt_tokens))
        tokens = len(longest.prompt_tokens) + self.sampling.max_new_tokens
        if tokens > positions:
            raise DataError(
                f"sample {longest.sample_id} can have {tokens} tokens, and the student has {positions} "
                "positions: lower rollout.sampling.max_new_tokens"
            )

    def require_vocabulary(self, size: int) -> None:
        """Raise DataError naming the sample when a prompt token is `size` or above."""
        for question in self.questions:
            if int(question.prompt_tokens.max(initial=0)) >= size:
                raise DataError(
                    f"sample {question.sample_id}: token {int(question.prompt_tokens.max())} is outside the "
                    f"student's vocabulary of {size}"
                )


@dataclass(frozen=True)
class _RankShare:
    """What one rank did for a step: its samples in order, or what stopped it; and the time it took."""

    samples: list[Sample]
    error: EngineError | None = None
    rollout_s: float = 0.0
    teacher_s: float = 0.0


class LiveBatches:
    """Batches that are sampled and scored when they are asked for, by all ranks together.

    Entering opens the student's sampler and the teacher's process on every rank; leaving ends both.
    Both this and `get` raise EngineError on every rank alike, EngineDied when a teacher's process was
    killed: no collective is left half done, and nothing of the trainer has changed.
    """

    def __init__(self, data: LiveData, trainer: Trainer, plan: BatchPlan) -> None:
        self._data, self._trainer, self._plan = data, trainer, plan
        self._ranks = trainer.ranks
        self._gatherer = WeightGatherer(trainer.optimization, trainer.architecture)
        self._vocabulary = trainer.architecture.vocab_size
        self._open = ExitStack()
        self._student: Engine
        self._teacher: EngineProcess
        self._samples = ListedSamples()
        self.seconds: Mapping[str, float] = {}

    def __enter__(self) -> LiveBatches:
        with ExitStack() as stack:
            self._agree(self._start(stack))
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def get(self, step: int) -> list[MicroBatch]:
        shares = self._agree(self._share(step))
        world = len(shares)
        count = self._plan.global_batch_size
        self._samples = ListedSamples([shares[at % world].samples[at // world] for at in range(count)])
        # A rank waits for the slowest, so that is what a step spends on each.
        self.seconds = {
            "rollout_s": max(share.rollout_s for share in shares),
            "teacher_s": max(share.teacher_s for share in shares),
        }
        micro_batches = self._trainer.loader(self._samples).micro_batches(range(count))
        return ready(micro_batches, self._trainer.device)

    def check(self, step: int, micro_batches: list[MicroBatch]) -> None:
        """Before the first step of all: FP8's scales, and whether sampler and trainer agree."""
        if step == 0:
            self._trainer.find_scales(self._trainer.loader(self._samples), micro_batches)
            check_rollouts(self._trainer, micro_batches, LIVE_CAUSES)

    def lengths(self, step: int) -> NDArray[np.int64]:
        return self._samples.lengths

    def _start(self, stack: ExitStack) -> _RankShare:
        data = self._data
        give_back_memory()  # before the teacher's process is told its share
        try:
            engine = kind_of(data.score.engine).beside_trainer(data.score.engine)
            self._teacher = stack.enter_context(
                EngineProcess("the teacher", engine, str(data.teacher_dir), torch.get_num_threads())
            )
            self._student = stack.enter_context(closing(open_engine(data.engine, str(data.student_dir))))
            self._teacher.ready()
        except EngineError as error:
            return _RankShare([], error)
        return _RankShare([])

    def _share(self, step: int) -> _RankShare:
        """Sample and score this rank's part of the step: every so many-th of its positions."""
        began = time.perf_counter()
        requests = self._requests(step)[self._ranks.rank :: self._ranks.world_size]
        try:
            self._student.load_weights(self._gatherer.weights())
            rollouts = list(self._student.generate(requests, self._data.sampling, self._data.end_tokens))
            sampled = time.perf_counter()
            scores = list(self._teacher.score(rollouts, self._data.score.top_k))
            for score in scores:
                self._require_vocabulary(score)
            samples = [Sample(rollout, score) for rollout, score in zip(rollouts, scores, strict=True)]
        except EngineError as error:
            return _RankShare([], error)
        return _RankShare(samples, None, sampled - began, time.perf_counter() - sampled)

    def _require_vocabulary(self, score: Score) -> None:
        """Raise EngineError for a token that the student has not: of the same tokenizer, models can be padded
        to other sizes. Its log-prob would be that of a logit of 0."""
        largest = -1 if score.top_k is None else int(score.top_k.ids.max(initial=-1))
        if largest >= self._vocabulary:
            raise EngineError(
                f"sample {score.sample_id}: among the teacher's likeliest tokens is {largest}, beyond the "
                f"student's vocabulary of {self._vocabulary}: lower score.top_k, or set teacher.model to a "
                "model whose vocab_size is not larger"
            )

    def _requests(self, step: int) -> list[Prompted]:
        repeats: Counter[int] = Counter()
        requests = []
        for position in self._plan.samples(step).tolist():
            question = self._data.questions[position]
            seed = self._data.seed_of(step, question.sample_id, repeats[position])
            requests.append(Prompted(question.sample_id, question.prompt_tokens, seed))
            repeats[position] += 1
        return requests

    def _agree(self, own: _RankShare) -> list[_RankShare]:
        """Every rank's share, by rank. Raises the same error on every rank when one of them has one."""
        shares: list[Any] = [own]
        if self._ranks.world_size > 1:
            shares = [None] * self._ranks.world_size
            dist.all_gather_object(shares, own)
        errors = [share.error for share in shares if share.error is not None]
        if errors:
            raise next((error for error in errors if not isinstance(error, EngineDied)), errors[0])
        return shares
