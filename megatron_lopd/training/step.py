"""Micro-batches through the model with an objective at its end: one forward and one backward each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lopd.data.collate import MicroBatch
from megatron_lopd.errors import ConfigError
from megatron_lopd.mcore.model import PackedGPTModel, response_loss
from megatron_lopd.mcore.schedule import run_schedule
from megatron_lopd.objectives import Objective, TokenLogProbs, TokenPlaces, TopKLogProbs
from megatron_lopd.ops.softmax import ResponseLogProbs
from megatron_lopd.training.metrics import TokenValues


def run_micro_batches(
    chunks: Sequence[torch.nn.Module],
    objective: Objective,
    micro_batches: Sequence[MicroBatch],
    token_budget: int,
    device: torch.device,
    *,
    forward_only: bool = False,
    rows: int | None = None,
) -> list[TokenValues]:
    """Forward each micro-batch, and backward unless `forward_only`; then finalize the gradients.

    `chunks` are this rank's wrapped PackedGPTModels. The gradients end up those of
    `sum(loss_weights * token_weights * token_loss) / sum(loss_count)` over the global batch. `rows` as of
    `vocab_parallel_loss`. Returns the values of each micro-batch on the last pipeline stage, nothing on the
    others.
    """
    finish = _Finish(objective, rows, with_gradient=not forward_only)
    values: list[TokenValues] = run_schedule(
        chunks, micro_batches, token_budget, device, finish, forward_only=forward_only
    )
    return values


@dataclass(frozen=True)
class _Finish:
    """From a micro-batch's hidden states to (summed weighted loss, its count, constants for the metrics), as
    Megatron-Core's schedules want."""

    objective: Objective
    rows: int | None
    with_gradient: bool

    def __call__(
        self, model: PackedGPTModel, batch: MicroBatch, hidden: Tensor
    ) -> tuple[Tensor, Tensor, TokenValues]:
        needs = self.objective.needs
        places = TokenPlaces(batch.response_position, batch.prefix_discrepancy)
        weights = batch.loss_weights * self.objective.token_weights(places)
        # The loss may leave the output weight's gradient behind: not for a forward pass alone, which can have
        # gradients enabled for what the layers make of it.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.with_gradient):
            summed = response_loss(
                model,
                hidden,
                batch.predict_index,
                batch.response_tokens,
                batch.top_k_ids if "top_k" in needs else None,
                lambda scored, rows: self._token_loss(self._tokens(batch, scored, rows)),
                weights,
                rows=self.rows,
            )
        teacher, behaviour, sampled = self._kept(batch)
        kept = TokenLogProbs(summed.log_probs, teacher, behaviour, sampled=sampled)
        values = TokenValues(summed.token_loss, weights, summed.entropy, kept)
        count = torch.tensor(batch.loss_count, dtype=torch.int, device=hidden.device)
        return summed.total, count, values

    def _token_loss(self, tokens: TokenLogProbs) -> Tensor:
        loss = self.objective.token_loss(tokens)
        if loss.shape != tokens.current.shape:
            raise ConfigError(
                f"train.objective={self.objective.name}: token_loss gives {list(loss.shape)} for "
                f"{list(tokens.current.shape)}: return the loss of each response token"
            )
        return loss

    def _tokens(self, batch: MicroBatch, scored: ResponseLogProbs, rows: slice) -> TokenLogProbs:
        teacher, behaviour, sampled = self._kept(batch)
        return TokenLogProbs(
            scored.log_probs,
            None if teacher is None else teacher[rows],
            None if behaviour is None else behaviour[rows],
            _top_k(batch, scored, rows) if "top_k" in self.objective.needs else None,
            None if sampled is None else sampled[rows],
        )

    def _kept(self, batch: MicroBatch) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The teacher's, the behaviour and the sampler's log-probs, as far as the objective needs them."""
        needs = self.objective.needs
        return (
            batch.teacher_log_probs if "teacher" in needs else None,
            batch.behaviour_log_probs if "behaviour" in needs else None,
            batch.sampled_log_probs if "behaviour" in needs else None,
        )


def _top_k(batch: MicroBatch, scored: ResponseLogProbs, rows: slice) -> TopKLogProbs | None:
    """The kept top k of `rows` beside the student's; None where none was kept."""
    if batch.top_k_ids is None or batch.top_k_log_probs is None or batch.tail_log_probs is None:
        return None
    return TopKLogProbs(
        scored.top_k_log_probs,
        scored.tail_log_probs,
        batch.top_k_log_probs[rows],
        batch.tail_log_probs[rows],
        counted=batch.top_k_ids[rows] != batch.response_tokens[rows, None],
    )
