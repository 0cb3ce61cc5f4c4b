"""What an objective is: a loss of each response token, and the metrics that belong to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from megatron_lopd.config import Options, WeightsConfig, check_options
from megatron_lopd.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

KeptLogProbs = Literal["teacher", "behaviour", "top_k"]


@dataclass(frozen=True)
class TopKLogProbs:
    """The teacher's k likeliest tokens after each prefix, under the student and the teacher, nats.

    `current` [R, k] and `current_tail` [R] are the student's (differentiable), `teacher` [R, k] and
    `teacher_tail` [R] constants. A tail is the log of the mass of every token that is neither among the k nor
    a_t. `counted` bool [R, k] is False where one of the k is a_t: TokenLogProbs holds that one already.
    """

    current: Tensor
    current_tail: Tensor
    teacher: Tensor
    teacher_tail: Tensor
    counted: Tensor


@dataclass(frozen=True)
class TokenLogProbs:
    """`log pi(a_t | s_t)` of each response token under three models, [R] each, nats.

    `current` is the student being trained (differentiable), `teacher` is pi_T and `behaviour` is pi_ref, the
    student that sampled, all at temperature 1; the last two are constants, None where not kept. `top_k` has
    the tokens beside a_t, None where the objective has no need of them. `sampled` is the log-prob under the
    distribution q that a_t was really drawn from, pi_ref after temperature, top-p and top-k; None where that
    is `behaviour`.
    """

    current: Tensor
    teacher: Tensor | None
    behaviour: Tensor | None
    top_k: TopKLogProbs | None = None
    sampled: Tensor | None = None

    def of_teacher(self) -> Tensor:
        """`teacher`. DataError where it was not kept."""
        if self.teacher is None:
            raise DataError(
                "the objective needs the teacher's log-probs of every rollout and the data has none: "
                "run the score stage and train from its scores"
            )
        return self.teacher

    def of_behaviour(self) -> Tensor:
        """`behaviour`. DataError where it was not kept."""
        if self.behaviour is None:
            raise DataError(
                "the rollouts hold no behaviour log-probs, so nothing can be compared with pi_ref: "
                "train on responses that the rollout stage sampled"
            )
        return self.behaviour

    def of_draw(self) -> Tensor:
        """`log q(a_t | s_t)`: `sampled`, or `behaviour` where they are the same. DataError as there."""
        return self.of_behaviour() if self.sampled is None else self.sampled


@dataclass(frozen=True)
class TokenPlaces:
    """Where in its response each token stands, [R] each; constants of the data.

    `position` int64, from 0. `discrepancy` float in [0, 1]: the share of the response's disagreement between
    pi_T and pi_ref that lies before the token (MicroBatch.prefix_discrepancy), None where not known.
    """

    position: Tensor
    discrepancy: Tensor | None


class Objective(ABC):
    """A loss and the metrics that belong to it; made by `get_objective` from its Options and the weights.

    An objective of its own overrides `token_loss` and `metrics`, and what it needs of these:
    `name` is what a recipe calls it, `caption` its formula in a line, for help and report. `Options` are the
    keys of the recipe's train.<name>. `needs`: the log-probs the data must hold for it. A metric's name says
    what it is whatever the objective: one that is another quantity has another name.
    """

    name: ClassVar[str]
    caption: ClassVar[str]
    Options: ClassVar[type[Options]] = Options
    needs: ClassVar[tuple[KeptLogProbs, ...]] = ()
    metric_names: tuple[str, ...] = ()

    def __init_subclass__(cls) -> None:
        check_options(cls, Options)

    def __init__(self, options: Any = None, weights: WeightsConfig | None = None) -> None:
        self.options = self.Options() if options is None else options
        self.weights = WeightsConfig() if weights is None else weights

    @abstractmethod
    def token_loss(self, tokens: TokenLogProbs) -> Tensor:
        """The loss of each response token, [R], differentiable in the student's log-probs.

        Raises DataError when it needs a log-prob that the data does not hold.
        """

    def token_weights(self, places: TokenPlaces) -> Tensor:
        """What the step multiplies each token's loss by, [R], beside the normalisation; constants.

        Apart from `token_loss`, so that `metrics` are of the unweighted loss. Raises DataError as it does.
        """
        import torch

        return torch.ones_like(places.position, dtype=torch.float32)

    @abstractmethod
    def metrics(self, tokens: TokenLogProbs, loss: Tensor) -> dict[str, float]:
        """`metric_names` over all response tokens of a global batch (R >= 1).

        `loss` [R] is what `token_loss` gave; `tokens.top_k` is None, as k floats a token are not gathered.
        """
