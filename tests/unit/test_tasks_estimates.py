"""pass@k and its company, against brute force."""

from __future__ import annotations

import math
import statistics
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lopd.evaluation.estimates import estimate, ks_of, majority, paired, pass_at_k


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(right: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(right)))
    subsets = [any(subset) for subset in combinations(right, k)]
    # fp64, a product of at most nine factors
    assert pass_at_k(len(right), sum(right), k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_where_binomials_overflow() -> None:
    # 1 - C(9999, 5000) / C(10000, 5000) = 5000 / 10000, where either binomial is about 1e3008
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5, rel=1e-9)  # fp64, 1 factor of 1 - 1/2
    assert 0 <= pass_at_k(10_000, 5_000, 5_000) <= 1


@pytest.mark.parametrize(
    ("samples", "ks"),
    [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8]), (33, [1, 2, 4, 8, 16, 32, 33])],
)
def test_ks(samples: int, ks: list[int]) -> None:
    assert ks_of(samples) == ks


def test_the_error_is_over_prompts() -> None:
    values = [0.0, 0.25, 1.0, 0.5]
    found = estimate(values)
    assert found.share == pytest.approx(0.4375)
    assert found.error == pytest.approx(statistics.stdev(values) / 2)  # sqrt(4)
    assert estimate([1.0]).error is None


@pytest.mark.parametrize(
    ("answers", "right"),
    [
        ([("3", False), ("7", True), ("7", True)], True),
        ([("3", False), ("7", True), ("3", False)], False),
        ([("3", False), ("7", True)], False),  # the earliest of equals
        ([(None, False), (None, False), ("7", True)], True),  # no answer is no vote
        ([(None, False)], False),
    ],
)
def test_majority(answers: list[tuple[str | None, bool]], right: bool) -> None:
    assert majority(answers) is right


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_the_sign_test_is_the_binomials_own(pairs: list[tuple[bool, bool]]) -> None:
    found = paired([before for before, _ in pairs], [after for _, after in pairs])
    better, worse = pairs.count((False, True)), pairs.count((True, False))
    assert (found.problems, found.better, found.worse) == (len(pairs), better, worse)
    differ = better + worse
    tail = sum(math.comb(differ, wins) for wins in range(min(better, worse) + 1)) / 2**differ
    assert found.p == pytest.approx(min(1, 2 * tail), rel=1e-9)


def test_the_sign_test_of_more_pairs_than_a_float_has_ways_for() -> None:
    shares = [0.0] * 60_000 + [1.0] * 40_000
    assert paired(shares, [1 - each for each in shares]).p < 1e-300
    assert paired(shares[:50_000] * 2, [0.5] * 100_000).p < 1e-300
    even = [0.0, 1.0] * 5_000
    assert paired(even, even[::-1]).p == 1
