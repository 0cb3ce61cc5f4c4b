"""The math grader: what counts as the same answer, and that nothing a model writes can hurt the run."""

from __future__ import annotations

import csv
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_lopd.errors import ConfigError, DataError, EngineDied, EngineError
from megatron_lopd.graders import Sandbox, Verdict, notation, open_grader, surface
from megatron_lopd.graders.finding import TAIL, Answer, answers_in, is_sentence, last_boxed
from megatron_lopd.graders.math_grader import MathGrader
from megatron_lopd.graders.sandbox import CPU_SECONDS, MEMORY_BYTES, Outcome, Ration
from megatron_lopd.prompts.prompt import Prompt


@pytest.fixture(scope="module")
def grader() -> Iterator[MathGrader]:
    with MathGrader() as opened:
        yield opened


def verdict(grader: MathGrader, gold: str, response: str) -> Verdict:
    return grader.grade(Prompt("q", ({"role": "user", "content": "?"},), gold), response)


with (Path(__file__).parent / "disputed_answers.tsv").open(newline="") as table:
    DISPUTED = list(csv.DictReader(table, delimiter="\t", quoting=csv.QUOTE_NONE))
# What a gold is not: a sum that is worked out, and text about an answer.
ANSWERS_ALONE = {"", "3+4=7", "7=7", "7?", r"\text{(3,4)}", r"\text{Yes, it is}"}


@pytest.fixture(scope="module")
def verdicts(grader: MathGrader) -> dict[tuple[str, str], Verdict]:
    """By gold and answer: of each row, and of its two sides exchanged; an unboxed one as it is."""
    pairs = [(row["gold"], row["answer"]) for row in DISPUTED]
    unboxed = {(row["gold"], row["answer"]) for row in DISPUTED if row["kind"] == "unboxed"}
    pairs += [
        (said, gold) for gold, said in pairs if (gold, said) not in unboxed and said not in ANSWERS_ALONE
    ]
    responses = [pair[1] if pair in unboxed else rf"So it is \boxed{{{pair[1]}}}." for pair in pairs]
    asked = [(Prompt("q", (), gold), said) for (gold, _), said in zip(pairs, responses, strict=True)]
    return dict(zip(pairs, grader.grade_all(asked, seconds=2 * len(asked)), strict=True))


@pytest.mark.parametrize("kind", dict.fromkeys(row["kind"] for row in DISPUTED))
def test_disputed_answers(verdicts: dict[tuple[str, str], Verdict], kind: str) -> None:
    """Each as a careful person would say, for the reason in its row, and from either side."""
    for row in (row for row in DISPUTED if row["kind"] == kind):
        sides = [(row["gold"], row["answer"]), (row["answer"], row["gold"])]
        for found in [verdicts[side] for side in sides if side in verdicts]:
            assert (found.right, found.ungraded) == (row["verdict"] == "=", False), row


def test_a_gold_is_equal_to_itself(grader: MathGrader) -> None:
    golds = dict.fromkeys(row["gold"] for row in DISPUTED)
    grader.require([Prompt(str(number), (), gold) for number, gold in enumerate(golds)])


@pytest.mark.parametrize(
    ("response", "right"),
    [
        (r"\boxed{3}, no: \boxed{7}", True),
        (r"\boxed{7}, no: \boxed{3}", False),
        (r"\boxed{7} and then 3", True),  # the box comes first
        (r"\boxed{7} and \boxed{3", True),  # that one never closes
        (r"\boxed {7}", True),
        (r"\fbox{7}", True),
        (r"<think>\boxed{3}</think>\boxed{7}", True),
        (r"<think>\boxed{7}</think>\boxed{3}", False),
        (r"\boxed{7}</think>I do not know", False),  # the template opened it
        (r"<think>\boxed{7}", False),  # still thinking
        (r"</think>a<think>\boxed{7}", False),
        ("<answer>7</answer>", True),
        ("<answer> 7 </answer> or 8", True),
        (r"<answer>It is \boxed{7}.</answer>", True),
        (r"\boxed{3}<answer>7</answer>", True),
        (r"<answer>7</answer>, no: \boxed{3}", False),
        ("<answer>7</answer><answer>3</answer>", False),
        ("<answer></answer>7", False),
        ("The answer is 7e3", False),
        ("The answer is 7.", True),
        ("The answer is $7$", True),
        ("Together 3 and 4.\n#### 7", True),
        ("**Final Answer**\n\n$7$", True),
        ("The answer is\n\n$$\n7\n$$", True),
        ("The answer is 7.\nCheck: it's 3 plus 4, no more.", True),
        ("The answer is $8$.\nCheck: it's not 7", False),
        ("7 is a number. The final answer is 3", False),
        ("", False),
        ("I do not know", False),
    ],
)
def test_where_the_answer_is(grader: MathGrader, response: str, right: bool) -> None:
    assert verdict(grader, "7", response).right is right


def test_nested_braces() -> None:
    assert last_boxed(r"\boxed{\frac{1}{\sqrt{2}}} }") == r"\frac{1}{\sqrt{2}}"
    assert last_boxed(r"\boxed{\{1, 2\}}") == r"\{1, 2\}"
    assert last_boxed(r"\boxed{\boxed{5}}") == r"\boxed{5}"
    assert last_boxed(r"\\boxed{5} \boxed{") is None
    assert answers_in("x" * 5000 + r" \boxed{5} " + "x" * 5000) == [Answer("5", alone=True)]


@pytest.mark.parametrize(
    "piece", [" ", "\\ ", "1", ",", "1,", "a", "'", "{", "\\text{ ", "\\in", "①", "或", "42 is "]
)
def test_the_rules_of_a_long_answer_are_over_soon(piece: str) -> None:
    for start in ("", r"\text{", "0."):
        text = (start + piece * TAIL)[: TAIL - 1] + "x"
        began = time.process_time()
        for reading in notation.readings(text):
            surface.decided(reading, "x")
        answers_in(text)
        is_sentence(text)
        assert time.process_time() - began < 1  # a tenth of it, alone


def test_equal_answers_vote_together(grader: MathGrader) -> None:
    halves = {verdict(grader, "1/2", rf"\boxed{{{said}}}").answer for said in ("0.5", r"\frac12", "2/4")}
    assert len(halves) == 1
    wrong = {verdict(grader, "3", rf"\boxed{{{said}}}").answer for said in (r"\frac12", "1/2", "0.50")}
    assert len(wrong) == 1
    assert halves != {verdict(grader, "1/2", r"\boxed{4}").answer}
    assert verdict(grader, "3", "I do not know").answer is None


HANGS = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{(9999999!)!}", r"\boxed{10^{10^{10}}}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "response", [HANGS[0], *(pytest.param(each, marks=pytest.mark.nightly) for each in HANGS[1:])]
)
def test_a_hang_is_ungraded_and_the_next_is_graded(grader: MathGrader, response: str) -> None:
    began = time.monotonic()
    assert verdict(grader, "5", response) == Verdict(False, None, ungraded=True)
    assert time.monotonic() - began < 20 * CPU_SECONDS  # its limit is of processor time
    assert verdict(grader, "5", r"\boxed{5}").right


def test_hostile_answers_leave_the_others_their_time() -> None:
    """Together they keep to what they are given, and those it does not reach are late."""
    asked = [(Prompt("q", (), "5"), said) for said in [HANGS[0]] * 20 + [r"\boxed{4}", r"\boxed{5}"]]
    began = os.times()
    with MathGrader() as fresh:
        *hung, wrong, right = fresh.grade_all(asked, seconds=3)
    took = os.times().children_user - began.children_user
    assert {(each.right, each.ungraded, each.late) for each in hung} == {(False, True, True)}
    assert (wrong.ungraded, wrong.right, right.right) == (False, False, True)
    assert took < 20  # the start takes some; each of them alone might take CPU_SECONDS


def test_a_ration_is_kept_to_and_everyone_has_half_a_part() -> None:
    ration, allowed = Ration(seconds=10, calls=100, most=3), []

    def take_all(seconds: float) -> Outcome:
        allowed.append(seconds)
        return Outcome(None, late=True, seconds=seconds)

    for _ in range(100):
        ration.spend(take_all)
    assert sum(allowed) == pytest.approx(10)
    assert allowed[:2] == pytest.approx([3, 2.1])
    assert min(allowed) == pytest.approx(0.05)
    quick = Ration(seconds=10, calls=100, most=3)
    assert all(quick.spend(lambda seconds: Outcome(1, False, seconds / 1e6)).value for _ in range(99))
    assert quick.spend(take_all).seconds == pytest.approx(3)  # what they have left is had by the last


HOSTILE = {
    "braces": "{" * 100_000,
    "boxes": r"\boxed{" * 50_000,
    "a long word": "x" * 200_000,
    "many numbers": "1 " * 100_000,
    "digits": r"\boxed{" + "9" * 20_000 + "}",
    "fractions": r"\boxed{" + r"\frac{" * 2_000,
    "code": "\\boxed{__import__('os').system('touch pwned')} __import__('os').system('touch pwned')",
    "control characters": "\\boxed{\x00\x1b\ud7ff}",
    "dollars": "$" * 10_001,
    "other scripts": "\\boxed{\u0665 \u4e94}",
    "unbalanced": r"\boxed{5)]}\left(",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_wrong(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with MathGrader() as fresh:  # one that stands in the empty directory
        assert not verdict(fresh, "6", HOSTILE[name]).right
    assert list(tmp_path.iterdir()) == []


GREEDY = """
import signal

def fill(size):
    return len(bytearray(size))

def fail():
    raise RuntimeError

def die():
    signal.raise_signal(signal.SIGKILL)
"""


def test_a_sandbox_bounds_what_any_code_may_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "greedy.py").write_text(GREEDY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    sandbox = Sandbox("greedy")
    try:
        assert sandbox.ask("fill", MEMORY_BYTES) is None
        assert sandbox.ask("fill", 1000) == 1000
        assert sandbox.ask("fail") is None
        assert sandbox.ask("nothing of that name") is None
        with pytest.raises(EngineError, match="the process of greedy was killed by SIGKILL: run the same"):
            sandbox.ask("die")
        assert sandbox.ask("fill", 10) == 10  # in a fresh process
    finally:
        sandbox.close()
    absent = Sandbox("no_such_module")
    with pytest.raises(EngineError, match="no_such_module ended with code 1: what it said is above"):
        absent.ask("fill", 1)


def test_a_grader_killed_from_outside_is_no_verdict() -> None:
    with MathGrader() as fresh:
        assert verdict(fresh, "5", r"\boxed{5}").right
        process = fresh._sandbox._process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(EngineDied, match="was killed by SIGKILL"):
            verdict(fresh, "5", r"\boxed{5}")


def _state(process: int) -> str:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


@pytest.mark.parametrize("letters", [1, 1 << 22], ids=["a short answer", "one above what a pipe holds"])
def test_a_grader_stopped_from_outside_is_given_up(monkeypatch: pytest.MonkeyPatch, letters: int) -> None:
    with MathGrader() as fresh:
        assert verdict(fresh, "5", r"\boxed{5}").right
        process = fresh._sandbox._process
        assert process is not None
        at_work = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
        os.kill(at_work if letters == 1 else process.pid, signal.SIGSTOP)
        with monkeypatch.context() as impatient:
            impatient.setattr("megatron_lopd.graders.sandbox.PATIENCE_SECONDS", 0.2)
            impatient.setattr("megatron_lopd.graders.sandbox.PATIENCE_TIMES", 0)
            with pytest.raises(EngineDied, match="gave no answer in 0 s, and was killed"):
                fresh.grade(Prompt("a", (), "5"), "x" * letters)
        # What was at work goes with it: it is nobody's child here, and init's in a moment.
        until = time.monotonic() + 10
        while (state := _state(at_work)) not in ("Z", ""):
            assert time.monotonic() < until, state
            time.sleep(0.05)
        assert verdict(fresh, "5", r"\boxed{5}").right


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "has no answer to grade by"),
        ("", "its answer '' is not one that math-verify can read"),
        (r"\boxed{}", "can read"),
        (r"\begin{align", "can read"),
        ("}", "can read"),
        ("There are 5 cats", "can read"),  # as a sentence, no answer is equal to it
        ("The number of ways is 1,200.", "can read"),
    ],
)
def test_prompts_that_cannot_be_graded(grader: MathGrader, answer: str | None, message: str) -> None:
    good = Prompt("a", (), "7")
    with pytest.raises(DataError, match=rf"^p\.jsonl:2: prompt b: .*{message}"):
        grader.require([good, Prompt("b", (), answer, where="p.jsonl:2")])


def test_an_unknown_grader_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown grader 'maths' \(did you mean math\?\): use one of math, ari"
    ):
        open_grader("maths")
