"""What the log-prob operations are held to: the whole logits, log_softmax and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lopd.ops.softmax import LOG_ZERO, ResponseLogProbs

PADDING_ROWS = 3
DIFFERENTIABLE = ("log_probs", "log_sum_exp", "top_k_log_probs", "tail_log_probs")


def inputs(
    rows: int, vocab: int, k: int, dtype: torch.dtype, hidden_size: int = 5, scale: float = 2.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight with padding rows, tokens, and ids that repeat each other and the token."""
    generator = torch.Generator().manual_seed(rows * 1000 + vocab)
    hidden = torch.randn(rows, hidden_size, generator=generator, dtype=dtype)
    # Large padding rows: had they a share of the probability, it would be nearly all of it.
    weight = torch.randn(vocab + PADDING_ROWS, hidden_size, generator=generator, dtype=dtype) * scale
    weight[vocab:] *= 100
    tokens = torch.randint(vocab, (rows,), generator=generator)
    ids = torch.randint(vocab, (rows, k), generator=generator)
    if k:
        ids[::2, 0] = tokens[::2]
        ids[::3, -1] = ids[::3, 0]
    return hidden.requires_grad_(), weight.requires_grad_(), tokens, ids


def naive(
    hidden: Tensor, weight: Tensor, tokens: Tensor, ids: Tensor, vocab: int, temperature: float
) -> ResponseLogProbs:
    logits = hidden @ weight[:vocab].t() / temperature
    log_softmax = logits.log_softmax(-1)
    columns = torch.cat([tokens[:, None], ids], dim=1)
    in_tail = torch.ones_like(log_softmax, dtype=torch.bool).scatter(1, columns, False)
    return ResponseLogProbs(
        log_softmax.gather(-1, tokens[:, None]).squeeze(-1),
        logits.logsumexp(-1),
        -(log_softmax.exp() * log_softmax).sum(-1),
        log_softmax.gather(-1, ids),
        log_softmax.masked_fill(~in_tail, float("-inf")).logsumexp(-1),
    )


def values(result: ResponseLogProbs) -> list[Tensor]:
    return list(vars(result).values())


class Watch(TorchDispatchMode):
    """`widths` of matrix products' results; `unordered`: how many places a scatter would write two values to,
    or add two to, in whatever order a GPU's threads come. `trash` is a column that any value may go to."""

    def __init__(self, trash: int = -1) -> None:
        super().__init__()
        self.widths: list[int] = []
        self.unordered = 0
        self._trash = trash

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            self.widths.append(out.shape[1])
        if name in ("scatter_", "scatter_add_") and isinstance(args[3], Tensor):
            self._look_for_repeats(args[2], args[3], adds=name == "scatter_add_")
        return out

    def _look_for_repeats(self, columns: Tensor, source: Tensor, adds: bool) -> None:
        # Adding 0 changes nothing, and adding LOG_ZERO twice is as good as once.
        written = (source != 0) & (source != LOG_ZERO) if adds else columns != self._trash
        for places, which in zip(columns, written, strict=True):
            self.unordered += len(places[which]) - len(places[which].unique())


def unaligned(*matrices: Tensor | None) -> list[tuple[int, ...]]:
    """Strides of those whose rows, or columns where they are transposed, begin off 16 bytes."""
    given = [matrix for matrix in matrices if matrix is not None and matrix.numel()]
    return [matrix.stride() for matrix in given if max(matrix.stride()) * matrix.itemsize % 16]
