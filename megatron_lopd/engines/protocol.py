"""What every engine can do: sample responses, and score tokens that were sampled elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from megatron_lopd.config import Sampling
    from megatron_lopd.data.records import Rollout, Score


@dataclass(frozen=True)
class Prompted:
    """A sample to draw: `prompt_tokens` int32 [P]; `seed` is its own, so batching cannot change the draw."""

    sample_id: str
    prompt_tokens: NDArray[np.int32]
    seed: int


class Engine(Protocol):
    """A loaded model. Results come in the order of what was given."""

    def generate(
        self, requests: Sequence[Prompted], sampling: Sampling, end_tokens: frozenset[int]
    ) -> Iterator[Rollout]:
        """One response each, which stops at an end token (kept) or at max_new_tokens.

        With both of a Rollout's log-probs unless `sampling.is_plain`.
        """
        ...

    def score(self, rollouts: Sequence[Rollout], top_k: int = 0) -> Iterator[Score]:
        """`log pi(a_t | s_t)` at temperature 1 of each response token, whatever log-probs a rollout has.

        With `top_k` > 0 also the likeliest tokens at each position, and the mass of those that are neither
        among them nor a_t (records.TopK). Raises EngineError when that leaves no token over.
        """
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Put `weights`, by their names in a Hugging Face checkpoint, in the place of the model's own.

        Cast to the engine's dtype and copied. Raises EngineError for a name that is missing, unknown or of
        another shape; the model is then of no use until another call succeeds.
        """
        ...

    def close(self) -> None:
        """End what it has running beyond this process, and give back its memory; it is then of no use."""
        ...
