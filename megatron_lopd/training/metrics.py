"""A step's metrics: what every rank saw of the global batch, brought together and summed up alike.

Per-token values of the whole global batch are gathered (a few floats a response token), so a mean or a
quantile is of the batch itself whatever the layout, and not a mean of ranks' means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_lopd.data.collate import MicroBatch
from megatron_lopd.mcore.process_groups import Ranks
from megatron_lopd.objectives import Objective, TokenLogProbs


@dataclass(frozen=True)
class Counts:
    """Sums over a global batch: the loss's denominator, samples, tokens without padding, response tokens."""

    loss_count: int
    samples: int
    tokens: int
    response_tokens: int

    @staticmethod
    def of(micro_batches: Sequence[MicroBatch], device: torch.device) -> Counts:
        """This rank's `micro_batches` and those of its data and context parallel peers."""
        own = [
            (batch.loss_count, batch.num_samples, batch.num_tokens, len(batch.response_tokens))
            for batch in micro_batches
        ]
        total = torch.tensor(own, device=device).sum(0)
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        return Counts(*total.tolist())


# What of TokenLogProbs metrics read beside the student's: one float a token each, where it is there.
_KEPT = ("teacher", "behaviour", "sampled")


@dataclass(frozen=True)
class TokenValues:
    """Per-token values of a micro-batch or a batch: float32 [R] each, constants.

    `loss` is the objective's, `loss_weights` the MicroBatch's times its token weights, `entropy` in nats;
    kept log-probs as the objective needs, without `top_k`: a gather of k floats a token would be the step's
    largest.
    """

    loss: Tensor
    loss_weights: Tensor
    entropy: Tensor
    log_probs: TokenLogProbs

    @staticmethod
    def gather(parts: Sequence[TokenValues], device: torch.device) -> TokenValues:
        """All `parts` of all data and context parallel ranks, end to end."""
        table = torch.cat([part._table() for part in parts], dim=1)  # [columns, R of this rank]
        kept = parts[0].log_probs
        names = [name for name in _KEPT if getattr(kept, name) is not None]
        loss, loss_weights, entropy, current, *rest = _all_gather(table)
        by_name = dict(zip(names, rest, strict=True))
        gathered = TokenLogProbs(current=current, **{name: by_name.get(name) for name in _KEPT})
        return TokenValues(loss, loss_weights, entropy, gathered)

    def _table(self) -> Tensor:
        tokens = self.log_probs
        kept = [column for name in _KEPT if (column := getattr(tokens, name)) is not None]
        return torch.stack([self.loss, self.loss_weights, self.entropy, tokens.current, *kept])


def _all_gather(table: Tensor) -> Tensor:
    """[columns, R] of each data and context parallel rank -> [columns, sum of R], in rank order."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if group.size() == 1:
        return table
    sizes = [torch.empty(1, dtype=torch.int64, device=table.device) for _ in range(group.size())]
    dist.all_gather(sizes, torch.tensor([table.shape[1]], device=table.device), group=group)
    widths = [int(size) for size in sizes]
    padded = torch.nn.functional.pad(table, (0, max(widths) - table.shape[1])).contiguous()
    tables = [torch.empty_like(padded) for _ in widths]
    dist.all_gather(tables, padded, group=group)
    return torch.cat([part[:, :width] for part, width in zip(tables, widths, strict=True)], dim=1)


def summarize(
    parts: Sequence[TokenValues], counts: Counts, objective: Objective, ranks: Ranks, device: torch.device
) -> dict[str, float]:
    """loss, entropy and the objective's own metrics of a global batch, the same on every rank.

    `parts` are this rank's micro-batches on the last pipeline stage, and not looked at on others.
    """
    names = ("loss", "entropy", *objective.metric_names)
    values = torch.zeros(len(names), dtype=torch.float64, device=device)
    if ranks.is_last_stage:
        batch = TokenValues.gather(parts, device)
        measured = {
            "loss": (batch.loss_weights * batch.loss).double().sum().item() / counts.loss_count,
            "entropy": batch.entropy.double().mean().item(),
            **objective.metrics(batch.log_probs, batch.loss),
        }
        values = torch.tensor([measured[name] for name in names], dtype=torch.float64, device=device)
    if ranks.pp_size > 1:
        dist.broadcast(
            values,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return dict(zip(names, values.tolist(), strict=True))
