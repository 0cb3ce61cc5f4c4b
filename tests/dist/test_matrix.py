"""Losses, the whole gradient and five steps are the same at every layout."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from gloo import run_ranks
from matrix import (
    CLIP,
    LAYOUTS,
    LOSSES,
    OPTIONS,
    Runs,
    losses_of,
    make_models,
    train_in_small_buckets,
    train_layouts,
    train_with_rows_of_other_tokens,
)
from steps import Trained, whole_gradients

from tests.interpreter import run_interpreted
from tests.training_zoo import VOCABULARY


class Matrix:
    """The layouts of one number of processes run together, when the first of them is asked for."""

    def __init__(self, root: Path, asked: list[str]) -> None:
        self.root, self.asked = root, asked
        self.runs = cache(self._run)

    def _run(self, processes: int) -> list[Runs]:
        names = [name for name in self.asked if LAYOUTS[name].parallel.processes == processes]
        return run_ranks(processes, train_layouts, self.root, names, timeout=300)


@pytest.fixture(scope="module")
def matrix(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """Of the layouts that some test of this session is about."""
    names = {"one process"}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.function is test_a_layout_trains_as_one_process_does:
            names.add(item.callspec.params["name"])
    return Matrix(make_models(tmp_path_factory.mktemp("matrix")), [name for name in LAYOUTS if name in names])


NIGHTLY, RELEASE = pytest.mark.nightly, pytest.mark.release


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[NIGHTLY] * layout.nightly + [RELEASE] * layout.release)
        for name, layout in LAYOUTS.items()
        if name != "one process"
    ],
)
def test_a_layout_trains_as_one_process_does(matrix: Matrix, name: str) -> None:
    layout = LAYOUTS[name]
    ranks = matrix.runs(layout.parallel.processes)
    for model in layout.models:
        for loss in losses_of(name, model):
            expected = matrix.runs(1)[0]["one process", model, loss]
            check(f"{model}, {loss}", [rank[name, model, loss] for rank in ranks], expected)


@pytest.mark.parametrize(
    "name", [pytest.param("DP2, distributed optimizer", marks=NIGHTLY), "PP2 + VPP2 x DP2"]
)
def test_gradients_and_weights_may_travel_one_by_one(matrix: Matrix, name: str) -> None:
    layout = LAYOUTS[name]
    ranks = run_ranks(layout.parallel.processes, train_in_small_buckets, matrix.root, [name], timeout=300)
    for run in ranks[0]:
        expected = matrix.runs(1)[0]["one process", run[1], run[2]]
        check(f"{run[1]}, {run[2]}", [rank[run] for rank in ranks], expected)


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=NIGHTLY)], ids=["in part", "whole"])
@pytest.mark.parametrize(
    ("name", "train"),
    [
        pytest.param("one process", train_layouts, marks=NIGHTLY),
        ("TP2 + SP", train_layouts),
        pytest.param("PP2", train_layouts, marks=NIGHTLY),
        ("PP2 + VPP2", train_layouts),
        pytest.param("DP2, distributed optimizer", train_layouts, marks=NIGHTLY),
        ("DP2, distributed optimizer", train_in_small_buckets),
    ],
)
def test_the_output_weight_s_gradient_may_come_with_the_loss(
    matrix: Matrix, name: str, train: Callable[[Path, list[str], bool], Runs], whole: bool
) -> None:
    """Straight into main_grad, as on a GPU: tied and untied, of several micro-batches, reduced in time."""
    layout = LAYOUTS[name]
    ranks = run_interpreted(layout.parallel.processes, train, matrix.root, [name], whole, timeout=300)
    for run in ranks[0]:
        expected = matrix.runs(1)[0]["one process", run[1], run[2]]
        check(f"{run[1]}, {run[2]}", [rank[run] for rank in ranks], expected)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("teacher_log_probs", (LOSSES.keys() | OPTIONS.keys()) - {"sft", "fixed_negative"}),
        pytest.param("response_position", {"topk_forward_kl, horizon"}, marks=NIGHTLY),
        pytest.param("prefix_discrepancy", {"topk_reverse_kl, entropy, position"}, marks=NIGHTLY),
    ],
)
def test_the_matrix_sees_rows_that_are_not_of_the_tokens(
    matrix: Matrix, field: str, wrong: set[str]
) -> None:
    name = "CP2, recompute core_attn"
    ranks = run_ranks(2, train_with_rows_of_other_tokens, matrix.root, name, field)
    for loss in losses_of(name, "tied"):
        trained = [rank[name, "tied", loss] for rank in ranks]
        expected = matrix.runs(1)[0]["one process", "tied", loss]
        if loss in wrong:
            with pytest.raises(AssertionError):
                check(loss, trained, expected)
        else:
            check(loss, trained, expected)


def check(what: str, trained: list[Trained], expected: Trained) -> None:
    """Raise AssertionError unless all ranks saw what one process did. All is in fp32."""
    for rank in trained:
        # Nats. Sums in another order: some 1e-6 seen, through five steps of Adam 1e-5.
        assert rank.losses[0] == pytest.approx(expected.losses[0], rel=0, abs=1e-5), what
        assert rank.losses == pytest.approx(expected.losses, rel=0, abs=1e-4), what
        assert rank.norms == pytest.approx(expected.norms, rel=1e-4), what
        assert rank.clipped == pytest.approx(CLIP, rel=1e-4), what
    gradients, reference = (
        whole_gradients(ranks, VOCABULARY) for ranks in (trained, [expected])
    )
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    assert expected.norms[0] == pytest.approx(norm, rel=1e-4), f"{what}: every weight, counted once"
    assert gradients.keys() == reference.keys()
    for name, gradient in gradients.items():
        # Tensor by tensor, relative to its norm: entries near 0 are differences of large terms.
        error = ((gradient - reference[name]).norm() / reference[name].norm()).item()
        assert error < 1e-4, f"{what}: {name}: {error}"
