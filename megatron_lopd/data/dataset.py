"""What a trainer reads: committed rollouts, joined with a teacher's scores of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_lopd.data.packing import Padding
from megatron_lopd.data.records import Rollout, Sample, Score
from megatron_lopd.data.schemas import ROLLOUTS, SCORES
from megatron_lopd.data.shards import Record, ShardKind, ShardReader
from megatron_lopd.errors import DataError


def shard_name(kind: ShardKind[Record], number: int) -> str:
    """The file name of a shard within its artifact: `rollouts-00000.arrow`."""
    return f"{kind.name}-{number:05d}.arrow"


def open_shards(kind: ShardKind[Record], directory: Path) -> ShardReader[Record]:
    """All shards of a kind in an artifact, in order of their numbers.

    Raises DataError when there are none, or when one is missing in between.
    """
    paths = sorted(directory.glob(f"{kind.name}-*.arrow"))
    if not paths:
        raise DataError(f"{directory}: there are no {kind.name} shards ({shard_name(kind, 0)}, ...)")
    for number, path in enumerate(paths):
        if path.name != shard_name(kind, number):
            raise DataError(f"{directory}: {shard_name(kind, number)} is missing, yet {path.name} is there")
    return ShardReader(kind, paths)


class TrainingData:
    """Samples in the order of the rollouts; scores are joined by sample id, whatever their own order.

    Raises DataError naming file and sample when a rollout has no score, a score has no rollout, or their
    lengths differ; and as ShardReader does.
    """

    def __init__(self, rollout_dir: Path, score_dir: Path | None = None) -> None:
        self._rollouts: ShardReader[Rollout] = open_shards(ROLLOUTS, rollout_dir)
        self._scores = None if score_dir is None else open_shards(SCORES, score_dir)
        self.sample_ids = self._rollouts.sample_ids
        responses = self._rollouts.lengths("response_tokens")
        self.lengths: NDArray[np.int64] = self._rollouts.lengths("prompt_tokens") + responses  # [n]
        if self._scores is not None and score_dir is not None:
            self._check_join(responses, self._scores, score_dir)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def sample(self, index: int) -> Sample:
        """Sample `index`, with the teacher's log-probs if there are scores. Its arrays are read-only."""
        rollout = self._rollouts.record(index)
        if self._scores is None:
            return Sample(rollout, score=None)
        return Sample(rollout, self._scores.record(self._scores.position(rollout.sample_id)))

    def require_within(self, token_budget: int, padding: Padding) -> None:
        """Raise DataError naming the longest sample when it is, padded, above `token_budget` tokens."""
        longest = int(self.lengths.argmax())
        tokens = int(self.lengths[longest])
        needed = padding.least_budget(tokens)
        if needed > token_budget:
            padded = f", which this layout pads to {needed}" if needed > tokens else ""
            raise DataError(
                f"{self._rollouts.path(longest)}: sample {self.sample_ids[longest]} has {tokens} tokens"
                f"{padded}, above micro_batch_tokens={token_budget}: raise it to at least {needed}"
            )

    def _check_join(self, responses: NDArray[np.int64], scores: ShardReader[Score], score_dir: Path) -> None:
        score_lengths = scores.lengths("log_probs")
        for sample_id, response in zip(self.sample_ids, responses, strict=True):
            if sample_id not in scores:
                raise DataError(f"{score_dir}: sample {sample_id} of the rollouts has no score")
            at = scores.position(sample_id)
            if score_lengths[at] != response:
                raise DataError(
                    f"{scores.path(at)}: sample {sample_id} has {score_lengths[at]} scores for {response} "
                    "response tokens: these scores are of other rollouts"
                )
        for at, sample_id in enumerate(scores.sample_ids):
            if sample_id not in self._rollouts:
                raise DataError(f"{scores.path(at)}: sample {sample_id} is scored but not in the rollouts")
