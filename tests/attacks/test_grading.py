"""Answers that are made to be graded wrongly, to hang the grader or to end it."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_lopd.graders.finding import TAIL
from megatron_lopd.graders.math_grader import MathGrader
from megatron_lopd.graders.sandbox import Sandbox
from megatron_lopd.prompts.prompt import Prompt
from tests.attacks.answers import hostile, near, texts, values, written

SOME = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
SECONDS = 0.2  # of processor for an answer here


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    opened = Sandbox("megatron_lopd.graders.math")
    yield opened
    opened.close()


def is_right(sandbox: Sandbox, gold: str, said: str) -> bool:
    found = sandbox.ask("compare", gold, rf"It is \boxed{{{said}}}.")
    assert found is not None, (gold, said)
    return bool(found.right)


@SOME
@given(data=st.data(), value=values)
def test_a_number_is_itself_and_no_other(sandbox: Sandbox, data: st.DataObject, value: Fraction) -> None:
    gold, again = data.draw(written(value)), data.draw(written(value))
    other = data.draw(near(value).flatmap(written))
    assert is_right(sandbox, gold, again), (gold, again)
    assert not is_right(sandbox, gold, other), (gold, other)
    assert not is_right(sandbox, other, gold), (other, gold)


@SOME
@given(gold=texts, said=texts)
def test_any_text_is_graded_or_refused_from_either_side(sandbox: Sandbox, gold: str, said: str) -> None:
    """A gold that can be read is equal to itself; and text that is not a gold's is not right by accident."""
    if sandbox.ask("is_readable", gold) is True:
        found = sandbox.ask("compare", gold, rf"\boxed{{{gold}}}")
        assert found is None or found.right or len(gold) > TAIL
    outcome = sandbox.call(SECONDS, "compare", gold, said)
    assert outcome.seconds <= 2 * SECONDS


@settings(SOME, max_examples=2)  # each takes its time
@given(answers=st.lists(hostile, min_size=1, max_size=12))
def test_a_set_of_hostile_answers_is_over_in_its_time(answers: list[str]) -> None:
    asked = [(Prompt("q", (), "7.25"), rf"\boxed{{{said}}}") for said in answers]
    verdicts = list(_GRADER.grade_all(asked, SECONDS * len(asked)))
    assert not any(each.right for each in verdicts)
    assert _GRADER.grade(Prompt("q", (), "7.25"), r"\boxed{29/4}").right


_GRADER = MathGrader()


@pytest.fixture(scope="module", autouse=True)
def grader() -> Iterator[None]:
    yield
    _GRADER.close()
