"""The `megatron` engine: scores by the trainer's own model, over as many ranks as hold it.

Rank 0 has the engine; the other ranks `serve` it. Each loads its part of the model, and runs its share of
the packed micro-batches: forward alone, no gradients, no optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_lopd.config import EngineConfig, ParallelConfig, Sampling
from megatron_lopd.convert.load_model import load_hf_weights
from megatron_lopd.data.collate import LossNormalization, MicroBatch
from megatron_lopd.data.records import Rollout, Sample, Score, TopK
from megatron_lopd.engines.protocol import Prompted
from megatron_lopd.engines.ranks import channel
from megatron_lopd.engines.requests import (
    check_finite,
    check_scoring,
    give_back_memory,
    memory_advice,
    tokenless_ids,
    windows,
)
from megatron_lopd.errors import EngineError, LopdError
from megatron_lopd.families.architecture import Architecture, read_architecture
from megatron_lopd.mcore import compat
from megatron_lopd.mcore.loader import BatchLoader, ListedSamples
from megatron_lopd.mcore.model import PackedGPTModel, build_model, response_top_k
from megatron_lopd.mcore.precision import packed_padding
from megatron_lopd.mcore.process_groups import Ranks, model_parallel
from megatron_lopd.mcore.schedule import run_schedule
from megatron_lopd.ops.kernel_trial import agree

MORE_RANKS = "or split the model over more ranks (score.engine.megatron.parallel)"


class MegatronEngine:
    """Rank 0's side, an `Engine`. Raises EngineError when the model does not load, ConfigError for a split.

    Scores do not depend on how requests are packed but for rounding. An error that one rank alone has while
    it computes ends that rank with its message, and the launcher then ends the others.
    """

    def __init__(self, config: EngineConfig, model_dir: str) -> None:
        self._config, self._model_dir = config, model_dir
        self._arch = read_architecture(model_dir)
        self._padding = packed_padding(_parallel(config), config.fp8)
        tokenless = tokenless_ids(config, model_dir, self._arch.vocab_size)
        self._tokens = self._arch.vocab_size - len(tokenless)
        channel().send(_Open(config, model_dir, tokenless))
        self._opened = ExitStack()
        self._model = self._opened.enter_context(_opened(config, model_dir, tokenless))

    def generate(
        self, requests: Sequence[Prompted], sampling: Sampling, end_tokens: frozenset[int]
    ) -> Iterator[Rollout]:
        """Raises EngineError: the recipe refuses it before (config/recipe.py)."""
        raise self._unable("sample")

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Raises EngineError: only a student in training gets new weights, to sample with."""
        raise self._unable("take new weights")

    def score(self, rollouts: Sequence[Rollout], top_k: int = 0) -> Iterator[Score]:
        """See `Engine.score`. Raises EngineError, naming the sample, for one that does not fit the model or a
        micro-batch, and for log-probs that are not finite; and when memory runs out."""
        rows, positions = self._arch.vocab_size, self._arch.max_positions
        check_scoring(rollouts, top_k, rows, self._tokens, positions, self._model_dir)
        for rollout in rollouts:
            self._check_fits(rollout)
        return (score for window in windows(rollouts, top_k) for score in self._score_window(window, top_k))

    def close(self) -> None:
        """Free the model, on every rank. The engine is of no use afterwards."""
        channel().send(_Close())
        self._opened.close()
        del self._model
        give_back_memory()

    def _score_window(self, rollouts: Sequence[Rollout], top_k: int) -> list[Score]:
        bare = [replace(each, log_probs=None, untruncated_log_probs=None) for each in rollouts]
        channel().send(_Score(bare, top_k))
        gathered = self._model.score(bare, top_k)
        assert gathered is not None
        scores = gathered.split(rollouts)
        for score in scores:
            for values in (score.log_probs, *([score.top_k.tail_log_probs] if score.top_k else [])):
                check_finite(score.sample_id, values, self._model_dir, self._config.dtype)
        return scores

    def _check_fits(self, rollout: Rollout) -> None:
        tokens = len(rollout.prompt_tokens) + len(rollout.response_tokens)
        needed, budget = self._padding.least_budget(tokens), self._config.options.micro_batch_tokens
        if needed > budget:
            raise EngineError(
                f"sample {rollout.sample_id} has {tokens} tokens, which this layout pads to {needed}, above "
                f"engine.megatron.micro_batch_tokens={budget}: raise it to at least {needed}"
            )

    def _unable(self, what: str) -> EngineError:
        return EngineError(f"{self._model_dir}: engine.name=megatron only scores, and cannot {what}")


def serve() -> None:
    """In every rank but 0: take part in the engines that rank 0 opens, until it leaves `leading`."""
    model: _Model | None = None
    with ExitStack() as opened:
        while not isinstance(message := channel().receive(), _Leave):
            if isinstance(message, _Open):
                try:
                    model = opened.enter_context(
                        _opened(message.config, message.model_dir, message.tokenless)
                    )
                except LopdError:
                    continue  # every rank has the same, and rank 0 says so
            elif isinstance(message, _Score):
                assert model is not None
                model.score(message.rollouts, message.top_k)
            else:
                opened.close()
                model = None
                give_back_memory()


@contextmanager
def leading() -> Iterator[None]:
    """In rank 0: the others `serve` what is opened within, and go on when it is left."""
    try:
        yield
    finally:
        channel().send(_Leave(), last=True)


@dataclass(frozen=True)
class _Open:
    config: EngineConfig
    model_dir: str
    tokenless: NDArray[np.int64]


@dataclass(frozen=True)
class _Score:
    rollouts: Sequence[Rollout]
    top_k: int


@dataclass(frozen=True)
class _Close:
    pass


@dataclass(frozen=True)
class _Leave:
    pass


@contextmanager
def _opened(config: EngineConfig, model_dir: str, tokenless: NDArray[np.int64]) -> Iterator[_Model]:
    """This rank's part of the model; every rank enters. They raise the same LopdError when one has one."""
    arch = read_architecture(model_dir)
    compat.prepare()
    with model_parallel(_parallel(config), seed=0) as ranks:
        agree(compat.device())
        error: LopdError | None = None
        try:
            setting = f"engine.dtype={config.dtype}"
            with memory_advice(model_dir, compat.device(), setting, f"set it to bf16, {MORE_RANKS}"):
                model = _Model(config, model_dir, arch, ranks, tokenless)
        except LopdError as raised:
            error = raised
        errors: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(errors, error)
        if error := next((each for each in errors if each is not None), None):
            raise error
        yield model


class _Model:
    """This rank's part of the model, ready to score."""

    def __init__(
        self,
        config: EngineConfig,
        model_dir: str,
        arch: Architecture,
        ranks: Ranks,
        tokenless: NDArray[np.int64],
    ) -> None:
        self._config, self._model_dir, self._ranks = config, model_dir, ranks
        self._device: torch.device = compat.device()
        self._tokenless = torch.from_numpy(tokenless).to(self._device)
        self._chunks = build_model(arch, _parallel(config), config.dtype, None, config.fp8)
        for chunk in self._chunks:
            load_hf_weights(chunk, arch, model_dir)
            chunk.requires_grad_(False).eval()

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout], top_k: int) -> _TokenScores | None:
        """All response tokens of `rollouts`, on rank 0; every rank calls, and the others get None."""
        samples = [Sample(each, None) for each in rollouts]
        packing = _Packing(self._config.options.micro_batch_tokens)
        loader = BatchLoader.of(
            ListedSamples(samples), packing, _parallel(self._config), self._ranks, self._config.fp8
        )
        packed = loader.packed(range(len(samples)))
        batches = [loader.micro_batch(chosen) for chosen in packed]
        setting = f"engine.megatron.micro_batch_tokens={packing.micro_batch_tokens}"
        with memory_advice(self._model_dir, self._device, setting, f"lower it; {MORE_RANKS}"):
            parts = run_schedule(
                self._chunks,
                batches,
                packing.micro_batch_tokens,
                self._device,
                partial(_score_micro_batch, top_k, self._tokenless),
                forward_only=True,
            )
        return self._gather(rollouts, packed, batches, parts)

    def _gather(
        self,
        rollouts: Sequence[Rollout],
        packed: Sequence[Sequence[int]],
        batches: Sequence[MicroBatch],
        parts: Sequence[Sequence[Tensor]],
    ) -> _TokenScores | None:
        """On rank 0, what every rank has. Tensor parallel ranks all have the same, and the first gives it."""
        lengths = np.array([len(rollout.response_tokens) for rollout in rollouts])
        begins = np.cumsum(lengths) - lengths
        own = []
        if self._ranks.is_last_stage and self._ranks.tp_rank == 0:
            for chosen, batch, part in zip(packed, batches, parts, strict=True):
                first = begins[np.array(chosen, dtype=np.int64)]
                places = first[batch.sequence_index.numpy()] + batch.response_position.numpy()
                own.append(_TokenScores(places, *(values.cpu().numpy() for values in part)))
        gathered: list[Any] | None = [None] * self._ranks.world_size if self._ranks.rank == 0 else None
        dist.gather_object(own, gathered)
        if gathered is None:
            return None
        return _TokenScores.join([part for each in gathered for part in each])


def _score_micro_batch(
    top_k: int, tokenless: Tensor, model: PackedGPTModel, batch: MicroBatch, hidden: Tensor
) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """(no loss, its count, a _TokenScores' tensors but for the places), as `run_schedule` wants."""
    ids, scored = response_top_k(model, hidden, batch.predict_index, batch.response_tokens, top_k, tokenless)
    parts = (scored.log_probs, ids.int(), scored.top_k_log_probs, scored.tail_log_probs)
    return hidden.new_zeros(()), torch.ones((), dtype=torch.int, device=hidden.device), parts


def _parallel(config: EngineConfig) -> ParallelConfig:
    return config.options.parallel or ParallelConfig()


@dataclass(frozen=True)
class _Packing:
    """BatchSettings: nothing is weighed."""

    micro_batch_tokens: int
    loss_normalization: ClassVar[LossNormalization] = "token_mean"


@dataclass(frozen=True)
class _TokenScores:
    """Scores of R response tokens; `places` are theirs in all requests' responses, end to end.

    `places` int64 [R], `log_probs` and `tail_log_probs` float32 [R], `ids` int32 [R, k] and `top_k_log_probs`
    float32 [R, k]; k may be 0.
    """

    places: NDArray[np.int64]
    log_probs: NDArray[np.float32]
    ids: NDArray[np.int32]
    top_k_log_probs: NDArray[np.float32]
    tail_log_probs: NDArray[np.float32]

    @staticmethod
    def join(parts: Sequence[_TokenScores]) -> _TokenScores:
        """All of them, in order of place."""
        columns = [
            np.concatenate(column) for column in zip(*(vars(part).values() for part in parts), strict=True)
        ]
        order = np.argsort(columns[0])
        return _TokenScores(*(column[order] for column in columns))

    def split(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """A Score for each rollout."""
        lengths = [len(rollout.response_tokens) for rollout in rollouts]
        assert np.array_equal(self.places, np.arange(sum(lengths)))  # every token, once
        ends = np.cumsum(lengths)
        scores = []
        for rollout, begin, end in zip(rollouts, ends - lengths, ends, strict=True):
            here = slice(begin, end)
            top_k = TopK(self.ids[here], self.top_k_log_probs[here], self.tail_log_probs[here])
            has_top_k = self.ids.shape[1] > 0
            scores.append(Score(rollout.sample_id, self.log_probs[here], top_k if has_top_k else None))
        return scores
