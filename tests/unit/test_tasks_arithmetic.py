"""The toy task: an independent evaluator agrees, splits never meet, and the grader is exact."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lopd.errors import ConfigError, DataError
from megatron_lopd.prompts.arithmetic import DIALECTS, SPLITS, Problem, grade, problems, solve

seeds = st.integers(min_value=0, max_value=2**32)
splits = st.sampled_from(SPLITS)


def nested(prompt: str) -> str:
    """``a+b*c`` as ``((a+b)*c)``: Python's own arithmetic, forced from left to right."""
    expression = prompt[0]
    for sign, digit in zip(prompt[1::2], prompt[2::2], strict=True):
        expression = f"({expression}{sign}{digit})"
    return expression


@given(seeds, splits)
def test_solution_holds_every_running_result(seed: int, split: str) -> None:
    for problem in problems(20, seed, split):
        prefixes = [problem.prompt[: 2 * i + 1] for i in range(1, 6)]
        results = [str(eval(nested(prefix)) % 10) for prefix in prefixes]
        signs, digits = problem.prompt[1::2], problem.prompt[2::2]
        steps = [f"{s}{d}={r}" for s, d, r in zip(signs, digits, results, strict=True)]
        assert problem.solution == problem.prompt[0] + "".join(steps)
        assert problem.answer == results[-1]
        assert grade(problem.prompt, problem.solution)


def test_splits_share_no_prompt_and_repeat_none() -> None:
    draws = {split: [list(problems(5_000, seed, split)) for seed in (0, 1)] for split in SPLITS}
    prompts = {split: {p.prompt for draw in draws[split] for p in draw} for split in SPLITS}
    assert not any(one & other for one, other in itertools.combinations(prompts.values(), 2))
    for draw in itertools.chain(*draws.values()):
        assert len({p.prompt for p in draw}) == len({p.id for p in draw}) == 5_000


def test_the_same_arguments_give_the_same_problems_on_any_machine() -> None:
    expected = Problem(id="arithmetic-86c60b3b528a14f5", prompt="3*8*4*0+2+1", answer="3")
    assert next(problems(1, 0, "eval")) == expected
    assert expected.solution == "3*8=4*4=6*0=0+2=2+1=3"
    assert list(problems(50, 3, "opd")) == list(problems(80, 3, "opd"))[:50]
    assert list(problems(50, 3, "opd")) != list(problems(50, 4, "opd"))


@pytest.mark.parametrize(
    "response",
    [
        "",
        "0",  # the digit alone is not the form that was taught
        "3+4=7*7=9-2=7+9=6*5=1",
        "3+4=7*7=9-2=7+9=6*5=0 ",
        "3+4=7*7=9-2=7+9=6*5=0\n",
        "3+4=7*7=9-2=7+9=6*5=00",
        "3+4=7*7=9-2=7+9=6*5==0",
        "3+4=7*7=9-2=7+9=6=0",
        "3+4=7*7=9-2=7*5=0",  # a step left out
        "3+4=7*7=9-2=7+9=6*5=",
        "3+4=7*7=9-2=7+9=6*5=\N{ARABIC-INDIC DIGIT ZERO}",  # a digit to Python's int(), not to us
    ],
)
def test_wrong_or_badly_ended_responses_are_refused(response: str) -> None:
    assert not grade("3+4*7-2+9*5", response)


def test_what_earlier_steps_say_is_not_graded() -> None:
    assert grade("3+4*7-2+9*5", "3+4=7*7=9-2=7+9=6*5=0")
    assert grade("3+4*7-2+9*5", "3+4=1*7=1-2=1+9=1*5=0")


@pytest.mark.parametrize("prompt", ["", "3", "3+", "3+44", "3/4", " 3+4", "3+4\n", "3+4="])
def test_a_prompt_of_another_task_is_an_error(prompt: str) -> None:
    with pytest.raises(DataError, match="not a chain of single digits"):
        grade(prompt, "=7")


def test_bad_requests_are_errors_at_once() -> None:
    with pytest.raises(ConfigError, match="unknown split 'test'"):
        problems(1, 0, "test")
    with pytest.raises(ConfigError, match="cannot draw -1 problems"):
        problems(-1, 0, "eval")
    with pytest.raises(ConfigError, match="cannot draw 100000000 problems"):
        problems(100_000_000, 0, "eval")


@given(seeds)
def test_each_dialect_is_right_in_its_own_form_alone(seed: int) -> None:
    for problem in problems(5, seed, "eval"):
        terse, equals = solve(problem.prompt, "terse"), solve(problem.prompt)
        assert terse == equals.replace("=", "")
        assert grade(problem.prompt, terse, ("terse",))
        assert not grade(problem.prompt, terse)
        assert not grade(problem.prompt, equals, ("terse",))
        assert all(grade(problem.prompt, text, tuple(DIALECTS)) for text in (terse, equals))
        mixed = equals.replace("=", "", 1)
        wrong = terse[:-1] + str((int(terse[-1]) + 1) % 10)
        short = terse[:-3]
        assert not any(grade(problem.prompt, text, tuple(DIALECTS)) for text in (mixed, wrong, short))
