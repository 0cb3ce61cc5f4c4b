"""The commands for notebooks and sweeps, and what they make as numpy arrays.

    import megatron_lopd as lopd

    run = lopd.Run("recipe.yaml", {"train.steps": 5}, seed=3)
    run.run()
    run.rollouts[0].response_tokens, run.scores[0].log_probs, run.metrics("train")["loss"]

A method does what the command of its name does, prints what it prints, and leaves the same files. Errors are
LopdError. Stages catch signals: call them from the main thread.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from megatron_lopd.config import Recipe, load_recipe
from megatron_lopd.pipeline.resolved import ResolvedRun
from megatron_lopd.runtime import environment

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from megatron_lopd.artifacts.committed import CommittedFile
    from megatron_lopd.commands.run import Command
    from megatron_lopd.data.records import Rollout, Score
    from megatron_lopd.data.shard_kind import ShardKind
    from megatron_lopd.data.shards import ShardReader

R = TypeVar("R", "Rollout", "Score")


class Run:
    """One recipe's run. What has been made is kept, and made no second time, as by the commands.

    `overrides` and `more` are what `key=value` is to a command: dotted keys as a mapping, and keys without a
    dot by name. A mapping given for a section replaces it. Raises ConfigError for a recipe that is wrong.
    """

    def __init__(self, recipe: str | Path, overrides: Mapping[str, Any] | None = None, **more: Any) -> None:
        environment.make_writable()
        self._path = str(recipe)
        given = {**(overrides or {}), **more}
        # JSON is YAML. A path is its text.
        self._overrides = [
            f"{key}={json.dumps(value, default=str, ensure_ascii=False)}" for key, value in given.items()
        ]
        self.recipe: Recipe = load_recipe(self._path, self._overrides)
        self.directory = Path(self.recipe.run_dir)

    def run(self) -> None:
        """Every stage that is needed and not yet committed, in order."""
        from megatron_lopd.commands.run import run_leaving_gpus

        run_leaving_gpus(self._command())

    def generate(self) -> Path:
        """The teacher answers the SFT prompts. Returns the artifact's directory, as all stages do."""
        return self._make("generate")

    def tokenize(self) -> Path:
        """SFT text from a file instead."""
        return self._make("tokenize")

    def sft(self) -> Path:
        """The student is fine-tuned on those answers."""
        return self._make("sft")

    def rollout(self) -> Path:
        """The student answers the OPD prompts."""
        return self._make("rollout")

    def score(self) -> Path:
        """The teacher scores those tokens."""
        return self._make("score")

    def train(self) -> Path:
        """OPD from the cached scores. Raises RefreshDue where `refresh` is to come first."""
        return self._make("train")

    def refresh(self) -> None:
        """Between two rounds of `train`: the student as it is now is rolled out and scored anew."""
        from megatron_lopd.commands.run import run_refresh

        run_refresh(ResolvedRun(self.recipe))

    def export(self) -> Path:
        """The trained student as a Hugging Face checkpoint."""
        return self._make("export")

    def evaluate(self) -> Path:
        """The models' accuracy on prompts with answers."""
        return self._make("evaluate")

    def report(self) -> Path:
        """The summary and the page."""
        return self._make("report")

    def online(self) -> Path:
        """The baseline: OPD with a live teacher."""
        return self._make("online")

    def status(self) -> list[str]:
        """How far the run is, a line a stage and more where workers are at one."""
        from megatron_lopd.commands.status import describe_run

        return list(describe_run(ResolvedRun(self.recipe)))

    @property
    def rollouts(self) -> Records[Rollout]:
        """The student's answers, in order. DataError before `rollout`."""
        from megatron_lopd.data.dataset import open_shards
        from megatron_lopd.data.schemas import ROLLOUTS

        return Records(open_shards(ROLLOUTS, self.directory / "rollout"))

    @property
    def scores(self) -> Records[Score]:
        """The teacher's scores: `scores[i]` is of `rollouts[i]`. DataError before `score`."""
        from megatron_lopd.data.dataset import open_scores

        return Records(open_scores(self.directory / "score"))

    def metrics(self, stage: str) -> dict[str, NDArray[np.float64]]:
        """What `sft`, `train` or `online` measured at each step so far: float64 [steps] by name.

        NaN where a step has no such value, or none that is finite. DataError before the stage's first step.
        """
        return read_metrics(self.directory / stage)

    def _command(self) -> Command:
        # Resolved anew each time: a notebook goes on while files change.
        from megatron_lopd.commands.run import Command

        return Command(ResolvedRun(self.recipe), self._path, self._overrides)

    def _make(self, stage: str) -> Path:
        from megatron_lopd.commands.run import run_one

        run_one(stage, self._command())
        return self.directory / stage


class Records(Sequence[R], Generic[R]):
    """Records of committed shards, read in place as they are asked for. Their arrays may be read-only."""

    def __init__(self, reader: ShardReader[R]) -> None:
        self._reader: ShardReader[R] = reader

    def __len__(self) -> int:
        return len(self._reader)

    @overload
    def __getitem__(self, index: int) -> R: ...
    @overload
    def __getitem__(self, index: slice) -> list[R]: ...
    def __getitem__(self, index: int | slice) -> R | list[R]:
        if isinstance(index, slice):
            return [self._reader.record(each) for each in range(*index.indices(len(self)))]
        return self._reader.record(index + len(self) if index < 0 else index)

    def __iter__(self) -> Iterator[R]:
        return iter(self._reader)

    def of(self, sample_id: str) -> R:
        """The record of a sample, by its id. DataError when there is none."""
        return self._reader.record(self._reader.position(sample_id))


@dataclass(frozen=True)
class RolloutArrays:
    """n responses, their tokens end to end: those of i are `[response_offsets[i] : response_offsets[i + 1]]`.

    `ids` and `finish_reasons` ("stop", "length"): text [n]. `prompt_tokens` int32 [P] with `prompt_offsets`
    int64 [n + 1]; `response_tokens` int32 [T] with `response_offsets` int64 [n + 1], the end token included.
    `log_probs` float32 [T], nats, of the distribution that was drawn from; None where nothing was sampled.
    `untruncated_log_probs` float32 [T], the model's own at temperature 1; None where those are `log_probs`.
    """

    ids: NDArray[np.str_]
    finish_reasons: NDArray[np.str_]
    prompt_tokens: NDArray[np.int32]
    prompt_offsets: NDArray[np.int64]
    response_tokens: NDArray[np.int32]
    response_offsets: NDArray[np.int64]
    log_probs: NDArray[np.float32] | None
    untruncated_log_probs: NDArray[np.float32] | None


@dataclass(frozen=True)
class ScoreArrays:
    """The scores of n responses, end to end as in RolloutArrays: `offsets` int64 [n + 1] of T tokens in all.

    `ids`: text [n]. `log_probs` float32 [T], nats: the teacher's, of each response token at temperature 1.
    `top_k_ids` int32 [T, k], likeliest first, `top_k_log_probs` float32 [T, k] and `tail_log_probs` float32
    [T], the log of the mass of all tokens that are neither; None where no top k was kept.
    """

    ids: NDArray[np.str_]
    offsets: NDArray[np.int64]
    log_probs: NDArray[np.float32]
    top_k_ids: NDArray[np.int32] | None
    top_k_log_probs: NDArray[np.float32] | None
    tail_log_probs: NDArray[np.float32] | None


def read_rollouts(path: str | Path) -> RolloutArrays:
    """All rollouts of an artifact's directory, or of one .arrow shard. DataError where that is damaged."""
    import numpy as np

    from megatron_lopd.data.schemas import ROLLOUTS

    reader = _reader(ROLLOUTS, Path(path))
    records = list(reader)
    kept = {"log_probs": [record.log_probs for record in records]}
    kept["untruncated_log_probs"] = [record.untruncated_log_probs for record in records]
    whole = {name: _joined(each) for name, each in kept.items()}
    return RolloutArrays(
        ids=np.array([record.sample_id for record in records]),
        finish_reasons=np.array([record.finish_reason for record in records]),
        prompt_tokens=np.concatenate([record.prompt_tokens for record in records]),
        prompt_offsets=_offsets(reader.lengths("prompt_tokens")),
        response_tokens=np.concatenate([record.response_tokens for record in records]),
        response_offsets=_offsets(reader.lengths("response_tokens")),
        **whole,
    )


def read_scores(path: str | Path) -> ScoreArrays:
    """All scores of an artifact's directory, or of one .arrow shard. DataError where that is damaged."""
    import numpy as np

    from megatron_lopd.data.dataset import open_scores
    from megatron_lopd.data.schemas import kind_of

    where = Path(path)
    reader = _reader(kind_of(where), where) if where.suffix == ".arrow" else open_scores(where)
    records = list(reader)
    top_k = [record.top_k for record in records if record.top_k is not None]
    return ScoreArrays(
        ids=np.array([record.sample_id for record in records]),
        offsets=_offsets(reader.lengths("log_probs")),
        log_probs=np.concatenate([record.log_probs for record in records]),
        top_k_ids=np.concatenate([each.ids for each in top_k]) if top_k else None,
        top_k_log_probs=np.concatenate([each.log_probs for each in top_k]) if top_k else None,
        tail_log_probs=np.concatenate([each.tail_log_probs for each in top_k]) if top_k else None,
    )


def read_metrics(directory: str | Path) -> dict[str, NDArray[np.float64]]:
    """What a stage that trains measured at each step: float64 [steps] by name, NaN where there is none.

    Of a committed stage the metrics are those it committed; how long a step took is in no manifest.
    """
    import numpy as np

    from megatron_lopd.artifacts.manifest import committed_file, is_committed, load_manifest
    from megatron_lopd.loggers import METRICS_FILE, TIMES_FILE, read_steps

    stage = Path(directory)
    metrics: Path | CommittedFile = stage / METRICS_FILE
    if is_committed(stage):
        metrics = committed_file(stage, load_manifest(stage), METRICS_FILE)
    times = read_steps(stage / TIMES_FILE) if (stage / TIMES_FILE).exists() else []
    took = {row["step"]: row for row in times}
    rows = [took.get(row["step"], {}) | row for row in read_steps(metrics)]
    names = dict.fromkeys(name for row in rows for name in row)
    # None, which stands for what is not finite, becomes NaN.
    return {name: np.array([row.get(name) for row in rows], dtype=np.float64) for name in names}


def _reader(kind: ShardKind[R], path: Path) -> ShardReader[R]:
    from megatron_lopd.data.dataset import open_shards
    from megatron_lopd.data.shards import ShardReader

    return ShardReader(kind, [path]) if path.suffix == ".arrow" else open_shards(kind, path)


def _joined(parts: Sequence[NDArray[np.float32] | None]) -> NDArray[np.float32] | None:
    """End to end; None where a part is."""
    import numpy as np

    there = [part for part in parts if part is not None]
    return np.concatenate(there) if len(there) == len(parts) else None


def _offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each of several runs begins, and where the last ends: int64 [n + 1]."""
    import numpy as np

    return np.concatenate([[0], np.cumsum(lengths)])
