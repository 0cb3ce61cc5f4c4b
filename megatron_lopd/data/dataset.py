"""What a trainer reads: committed rollouts, joined with a teacher's scores of them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_lopd.artifacts.committed import CommittedFile
from megatron_lopd.artifacts.manifest import committed_files, is_committed, load_manifest, plan_digest
from megatron_lopd.config import Sampling
from megatron_lopd.data.packing import Padding
from megatron_lopd.data.records import Rollout, Sample, Score
from megatron_lopd.data.schemas import ROLLOUTS, SCORES, UNTRUNCATED, kind_of
from megatron_lopd.data.shard_kind import Record, ShardKind
from megatron_lopd.data.shards import ShardReader
from megatron_lopd.errors import DataError


def shard_name(kind: ShardKind[Record], number: int) -> str:
    """The file name of a shard within its artifact: `rollouts-00000.arrow`."""
    return f"{kind.name}-{number:05d}.arrow"


def open_shards(kind: ShardKind[Record], directory: Path, check_ids: bool = True) -> ShardReader[Record]:
    """All shards of a kind that an artifact's manifest lists, in order. `check_ids` as of ShardReader.

    `directory` is an artifact's, or one within it. Raises DataError as `listed_shards`.
    """
    files, plan = listed_shards(kind, directory)
    return ShardReader(kind, files, check_ids, plan)


def open_scores(directory: Path, check_ids: bool = True) -> ShardReader[Score]:
    """The scores of an artifact, all with the k of its first shard. Raises as `open_shards`."""
    files, plan = listed_shards(SCORES, directory)
    kind = kind_of(files[0])
    return ShardReader(kind if kind.name == SCORES.name else SCORES, files, check_ids, plan)


def listed_shards(kind: ShardKind[Record], directory: Path) -> tuple[list[CommittedFile], str]:
    """The shards in `directory` that its artifact's manifest lists, by number, and that artifact's plan.

    Others that lie there are none of it. DataError where nothing is committed, where the manifest lists none
    there, or lacks one in between.
    """
    artifact = next((each for each in (directory, *directory.parents) if is_committed(each)), directory)
    manifest = load_manifest(artifact)
    place = directory.relative_to(artifact)
    files = {
        file.path.name: file
        for file in committed_files(artifact, manifest)
        if Path(file.name).parent == place and re.fullmatch(rf"{kind.name}-[0-9]+\.arrow", file.path.name)
    }
    if not files:
        raise DataError(f"{directory}: there are no {kind.name} shards ({shard_name(kind, 0)}, ...)")
    names = [shard_name(kind, number) for number in range(len(files))]
    if lacking := [name for name in names if name not in files]:
        raise DataError(f"{directory}: {lacking[0]} is missing, yet {max(files)} is there")
    return [files[name] for name in names], plan_digest(manifest.config, manifest.parents)


class TrainingData:
    """Samples in the order of the rollouts; scores are joined by sample id, whatever their own order.

    Raises DataError naming file and sample when a rollout has no score, a score has no rollout, or their
    lengths differ; and as ShardReader does. `leave_out_cut`: without the responses that were cut at the
    horizon, which must not be scored. `check_ids=False` for artifacts that are committed, and have not
    changed since: a process then keeps 8 bytes a sample, beside the mapped files.
    """

    def __init__(
        self,
        rollout_dir: Path,
        score_dir: Path | None = None,
        check_ids: bool = True,
        leave_out_cut: bool = False,
    ) -> None:
        self._rollouts: ShardReader[Rollout] = open_shards(ROLLOUTS, rollout_dir, check_ids)
        self.sample_ids = self._rollouts.sample_ids
        prompts, responses = (self._rollouts.lengths(f"{part}_tokens") for part in ("prompt", "response"))
        self.lengths: NDArray[np.int64] = prompts + responses  # [n]
        self._chosen: NDArray[np.int64] | None = None  # [n]; None: all
        if leave_out_cut:
            assert score_dir is None
            (self._chosen,) = self._rollouts.matches("finish_reason", "stop").nonzero()
            self.lengths = self.lengths[self._chosen]
        self._scores: ShardReader[Score] | None = None
        self._score_of: NDArray[np.int64] | None = None  # [n]; None: the scores are in the rollouts' order
        if score_dir is not None:
            self._scores = open_scores(score_dir, check_ids=False)  # the join finds what is there twice
            self._score_of = match_scores(self._rollouts, self._scores)

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, index: int) -> Sample:
        """Sample `index`, with the teacher's scores if there are any. Its arrays may be read-only."""
        rollout = self._rollouts.record(self._place(index))
        if self._scores is None:
            return Sample(rollout, score=None)
        return Sample(
            rollout, self._scores.record(index if self._score_of is None else int(self._score_of[index]))
        )

    def keeps_behaviour(self, sampling: Sampling) -> bool:
        """Whether the sampling model's own log-probs are kept of all that was drawn as `sampling` says."""
        return sampling.is_plain or bool(self._rollouts.lengths(UNTRUNCATED).all())

    def require_within(self, token_budget: int, padding: Padding) -> None:
        """Raise DataError naming the longest sample when it is, padded, above `token_budget` tokens."""
        at = int(self.lengths.argmax())
        longest, tokens = self._place(at), int(self.lengths[at])
        needed = padding.least_budget(tokens)
        if needed > token_budget:
            padded = f", which this layout pads to {needed}" if needed > tokens else ""
            raise DataError(
                f"{self._rollouts.path(longest)}: sample {self.sample_ids[longest]} has {tokens} tokens"
                f"{padded}, above micro_batch_tokens={token_budget}: raise it to at least {needed}"
            )

    def require_positions(self, positions: int) -> None:
        """Raise DataError naming the longest sample when it has more tokens than the model `positions`."""
        at = int(self.lengths.argmax())
        if self.lengths[at] > positions:
            longest = self._place(at)
            raise DataError(
                f"{self._rollouts.path(longest)}: sample {self.sample_ids[longest]} has "
                f"{self.lengths[at]} tokens, and the model to train has {positions} positions: drop the "
                "sample, or shorten it (sampling.max_new_tokens, where it was sampled)"
            )

    def require_vocabulary(self, size: int) -> None:
        """Raise DataError naming file and sample when a token or top-k id is `size` or above.

        From the index alone: call it before a model is allocated.
        """
        self._rollouts.require_vocabulary(size)
        if self._scores is not None:
            self._scores.require_vocabulary(size)

    def _place(self, index: int) -> int:
        """Where sample `index` is among all rollouts."""
        return index if self._chosen is None else int(self._chosen[index])


def match_scores(rollouts: ShardReader[Rollout], scores: ShardReader[Score]) -> NDArray[np.int64] | None:
    """The position of each rollout's score, int64 [n]; None where they are in the rollouts' order.

    Raises DataError naming file and sample unless every one has just one that fits it.
    """
    sample_ids, responses = rollouts.sample_ids, rollouts.lengths("response_tokens")
    positions = sample_ids.positions_in(scores.sample_ids)
    if positions is not None:
        scores.check_ids()
    if positions is not None and (positions < 0).any():
        missing = sample_ids[int((positions < 0).argmax())]
        raise DataError(f"{scores.path(0).parent}: sample {missing} of the rollouts has no score")
    lengths = scores.lengths("log_probs")
    differ = (lengths if positions is None else lengths[positions]) != responses
    if differ.any():
        index = int(differ.argmax())
        at = index if positions is None else int(positions[index])
        raise DataError(
            f"{scores.path(at)}: sample {sample_ids[index]} has {lengths[at]} scores for "
            f"{responses[index]} response tokens: these scores are of other rollouts"
        )
    if positions is not None and len(scores) > len(rollouts):
        used = np.zeros(len(scores), dtype=bool)
        used[positions] = True
        extra = int((~used).argmax())
        raise DataError(
            f"{scores.path(extra)}: sample {scores.sample_ids[extra]} is scored but not in the rollouts"
        )
    return positions
